"""Which tokens are to be read as which: sources, targets and what is preserved, as positions in prompts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from editing.concepts import Goal, Request, split
from editing.ledger import Aim, Ledger, Use, contexts
from mediation.cases import Segment, align, group_positions, located_tokens, segments
from mediation.pipelines import expansion, tokenizers_of

TOKENS = ("last_subject", "subject", "from_subject", "all")


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Tokens that are to be read as other tokens.

    Attributes:
        prompts: the distinct prompts that the tokens are in.
        ids: of the tokens of each prompt, first and end token included, not cut to the window.
        source: (pair, 2), index of a prompt and position in it.
        target: (pair, 2), likewise; of a preserved token, itself.
        weights: (pair,), float64.
        folds: (pair,), number of what the encoder reads before the concept, -1 in preserved prompts. Templates that
            start alike share it: to a causal encoder, their last subject tokens are one.
        goals: what each range of pairs is for, the edited concepts first.
        ledger: the same by what the encoder reads, to be compared with other requests.
        n_edited: how many of the first pairs are edited; the others are preserved.
    """

    prompts: list[str]
    ids: list[list[int]]
    source: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    folds: torch.Tensor
    goals: list[tuple[Goal, slice]]
    ledger: Ledger
    n_edited: int


def pair_tokens(pipe: DiffusionPipeline, network: str, request: Request, tokens: str) -> TokenPairs:
    """Finds, in every template, the tokens of each source concept and their partners in the target concept.

    Args:
        pipe: the pipeline, for its tokenizers.
        network: the text encoder that will read the prompts.
        request: concepts, templates, what to preserve, and weights.
        tokens: "last_subject" pairs the concepts' last tokens. "subject" pairs all their tokens, aligned from the
            end; the first tokens of the longer concept have no partner, and are left alone. "from_subject" pairs the
            last tokens and every later position of the window, by offset. "all" pairs the whole window: what stands
            before the concepts, the concepts, what follows, end and padding, each aligned from its end. Tokens of a
            source whose target is "" are paired with the empty prompt's tokens at the same positions.

    Raises:
        ValueError: if `tokens` is unknown, or a concept is truncated, or what is asked for contradicts itself: as a
            whole, or at a token that the encoder would have to read in two ways.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")
    tokenizer = tokenizers_of(pipe)[network]
    expand = expansion(pipe, tokenizer)
    templates = [tuple(map(expand, split(template))) for template in request.templates]
    prompts: dict[str, int] = {}  # to their index

    def place(concept: str, template: tuple[str, str]) -> _Place:
        (before, after), text = template, expand(concept)
        # The concept is where the template put it: a search would also find the template's own words.
        span = (len(before), len(before) + len(text))
        return _Place(prompts.setdefault(before + text + after, len(prompts)), span)

    goals = list(request.goals())
    places: list[list[tuple[_Place, _Place]]] = []  # of the source and of what it is to be read as, for each goal
    for goal in goals:
        own = [("", "")] if goal.is_prompt else templates
        places.append([(place(goal.source, t), place(goal.target, t if goal.target else ("", ""))) for t in own])
    concepts = [concept for goal in goals if not goal.is_prompt for concept in (goal.source, goal.target)]
    texts = list(dict.fromkeys([*prompts, *map(expand, concepts)]))
    located = dict(zip(texts, located_tokens(tokenizer, texts), strict=True))
    ledger = Ledger(tokenizer).enter(_uses(goals, lambda text: tuple(located[expand(text)].ids)), ())

    @functools.cache  # many sources may share a target
    def layout(place: _Place) -> list[Segment]:
        prompt = texts[place.prompt]
        return segments(tokenizer, prompt, (place.span,), offsets=located[prompt].offsets)

    def meet(goal: Goal, here: _Place, there: _Place) -> list[tuple[int, int]]:
        if goal.is_prompt:
            n_tokens, window = len(located[texts[here.prompt]].ids), tokenizer.model_max_length
            if n_tokens > window:
                raise ValueError(
                    f"the prompt {goal.source!r} cannot be preserved as a whole: it has {n_tokens} tokens, and the text"
                    f" encoder's window holds {window}; shorten it"
                )
            return [(position, position) for position in range(n_tokens)]
        if not goal.target:
            return [(position, position) for position in _positions(layout(here), tokens)]
        return _partners(layout(here), layout(there), tokens)

    beginnings: dict[tuple[int, ...], int] = {}

    def fold(place: _Place) -> int:
        first = group_positions(layout(place))["subject"][0]
        return beginnings.setdefault(tuple(located[texts[place.prompt]].ids[:first]), len(beginnings))

    pairs, weights, folds, ranges = [], [], [], []
    for goal, own in zip(goals, places, strict=True):
        first = len(pairs)
        for here, there in own:
            met = [((here.prompt, a), (there.prompt, b)) for a, b in meet(goal, here, there)]
            pairs += met
            folds += [-1 if goal.is_prompt else fold(here)] * len(met)
        weights += [goal.weight] * (len(pairs) - first)
        ranges.append((goal, slice(first, len(pairs))))
    source, target = zip(*pairs, strict=True)
    ids = [located[prompt].ids for prompt in prompts]
    return TokenPairs(
        prompts=list(prompts),
        ids=ids,
        source=torch.tensor(source),
        target=torch.tensor(target),
        weights=torch.tensor(weights, dtype=torch.float64),
        folds=torch.tensor(folds),
        goals=ranges,
        ledger=ledger.enter((), _aims(tokenizer, list(prompts), ids, pairs, ranges)),
        n_edited=ranges[len(request.pairs) - 1][1].stop,
    )


def windows(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention masks of whole windows, (prompt, window), as the pipeline's own `encode_prompt` has them.

    Args:
        tokenizer: of the text encoder.
        ids: of the tokens of untruncated prompts, first and end token included.
    """
    length, padding = tokenizer.model_max_length, tokenizer.pad_token_id
    cut = [list(own) if len(own) <= length else [*own[: length - 1], own[-1]] for own in ids]
    rows = torch.tensor([own + [padding] * (length - len(own)) for own in cut])
    return rows, (torch.arange(length) < torch.tensor([[len(own)] for own in cut])).long()


class _Place(NamedTuple):
    """Where a concept stands: index of a prompt, and its characters (start, stop)."""

    prompt: int
    span: tuple[int, int]


def _positions(layout: list[Segment], tokens: str) -> tuple[int, ...]:
    groups = group_positions(layout)
    if tokens == "from_subject":
        return groups["all"][groups["last_subject"][0] :]
    return groups[tokens]


def _partners(source: list[Segment], target: list[Segment], tokens: str) -> list[tuple[int, int]]:
    if tokens == "all":
        return sorted(align(source, target).items())
    a, b = _positions(source, tokens), _positions(target, tokens)
    # Aligned from the end, the longer list loses its first tokens; paired by offset, its last ones.
    n_pairs = min(len(a), len(b))
    kept = slice(-n_pairs, None) if tokens == "subject" else slice(n_pairs)
    return list(zip(a[kept], b[kept], strict=True))


def _uses(
    goals: Iterable[Goal], read: Callable[[str], tuple[int, ...]]
) -> Iterator[tuple[tuple[bool, tuple[int, ...]], Use]]:
    """Entries of a ledger, where `read` tells the tokens of a text."""
    for goal in goals:
        if goal.is_edited and read(goal.source) == read(goal.target):
            raise ValueError(f"source {goal.source!r} and target {goal.target!r} are the same to the text encoder")
        yield (goal.is_prompt, read(goal.source)), Use(goal.source, goal.is_edited, goal.is_prompt)


def _aims(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    ids: list[list[int]],
    pairs: list[tuple[tuple[int, int], tuple[int, int]]],
    ranges: list[tuple[Goal, slice]],
) -> Iterator[tuple[bytes, Aim]]:
    """Entries of a ledger: of each pair's source token, by all that the encoder reads of it."""
    n_read = [0] * len(prompts)
    for prompt, position in itertools.chain.from_iterable(pairs):
        n_read[prompt] = max(n_read[prompt], position + 1)
    known = [contexts(row[:n]) for row, n in zip(windows(tokenizer, ids)[0].tolist(), n_read, strict=True)]
    for goal, rows in ranges:
        for (prompt, position), (other, place) in pairs[rows]:
            aim = Aim(prompts[prompt], position, prompts[other], known[other][place], goal.is_prompt)
            yield known[prompt][position], aim
