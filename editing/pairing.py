"""Which tokens are to be read as which: sources, targets and what is preserved, as positions in prompts."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from editing.concepts import Goal, Request, split
from editing.ledger import Aim, Ledger, Use, contexts
from mediation.cases import LocatedTokens, Segment, align, group_positions, located_tokens, segments
from mediation.pipelines import expansion, tokenizers_of

TOKENS = ("last_subject", "subject", "from_subject", "all")


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Tokens that are to be read as other tokens.

    Attributes:
        prompts: the distinct prompts that the tokens are in.
        ids: of the tokens of each prompt, first and end token included, not cut to the window.
        source: (pair, 2), index of a prompt and position in it.
        target: (part, 2), likewise; of a preserved token, itself. A pair has several parts if its concept has several
            targets, and is then to be read as their mean.
        owners: (part,), the pair that each part belongs to.
        shares: (part,), float64, of each part in its pair's mean.
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
    owners: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor
    folds: torch.Tensor
    goals: list[tuple[Goal, slice]]
    ledger: Ledger
    n_edited: int

    def averaged(self, parts: torch.Tensor) -> torch.Tensor:
        """The mean of what each pair's targets have: (part, dim) -> (pair, dim)."""
        if len(parts) == len(self.source):
            return parts
        means = parts.new_zeros(len(self.source), parts.shape[1])
        return means.index_add_(0, self.owners, self.shares.to(parts)[:, None] * parts)


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
            source whose target is "" are paired with the empty prompt's tokens at the same positions; those of a source
            with several targets, with the partners in all of them.

    Raises:
        ValueError: if `tokens` is unknown, or a concept is truncated, or what is asked for contradicts itself: as a
            whole, or at a token that the encoder would have to read in two ways.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")
    tokenizer = tokenizers_of(pipe)[network]
    prompts, goals = _Prompts(tokenizer, expansion(pipe, tokenizer)), list(request.goals())
    places = [prompts.place_goal(goal, request.templates) for goal in goals]
    prompts.tokenize(concept for goal in goals for concept in (goal.source, *goal.shares))
    ledger = Ledger(tokenizer).enter(_uses(goals, prompts.read), ())

    pairs: list[_Pair] = []
    weights, folds, ranges, beginnings = [], [], [], {}
    for goal, own in zip(goals, places, strict=True):
        first = len(pairs)
        for here, there in own:
            met = prompts.stay(here) if goal.is_prompt else prompts.meet(goal, here, there, tokens)
            pairs += met
            fold = -1 if goal.is_prompt else beginnings.setdefault(prompts.beginning(here), len(beginnings))
            folds += [fold] * len(met)
        weights += [goal.weight] * (len(pairs) - first)
        ranges.append((goal, slice(first, len(pairs))))
    parts = [(owner, *part) for owner, (_, targets) in enumerate(pairs) for part in targets]
    owners, target, shares = zip(*parts, strict=True)
    return TokenPairs(
        prompts=prompts.texts,
        ids=prompts.ids,
        source=torch.tensor([source for source, _ in pairs]),
        target=torch.tensor(target),
        owners=torch.tensor(owners),
        shares=torch.tensor(shares, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        folds=torch.tensor(folds),
        goals=ranges,
        ledger=ledger.enter((), _aims(tokenizer, prompts, pairs, ranges)),
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


_Token = tuple[int, int]  # index of a prompt, and position in it
_Pair = tuple[_Token, list[tuple[_Token, float]]]  # a source token, and those that it is to be read as with shares


class _Prompts:
    """The prompts that a request makes, and their tokens, once `tokenize` was called."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, expand: Callable[[str], str]):
        self._tokenizer, self._expand = tokenizer, functools.cache(expand)
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}  # of the texts
        self._located: dict[str, LocatedTokens] = {}
        self._layout = functools.cache(self._find)  # many sources may share a target

    @property
    def ids(self) -> list[list[int]]:
        """Of the tokens of each prompt."""
        return [self._located[text].ids for text in self.texts]

    def place_goal(self, goal: Goal, templates: Iterable[str]) -> list[tuple[_Place, list[_Place]]]:
        """Places of the source and of the targets, in each template; a target that is empty stands in no template."""
        own = ["{}"] if goal.is_prompt else templates
        return [
            (self._place(goal.source, template), [self._place(one, template if one else "{}") for one in goal.shares])
            for template in own
        ]

    def _place(self, concept: str, template: str) -> _Place:
        (before, after), text = map(self._expand, split(template)), self._expand(concept)
        # The concept is where the template put it: a search would also find the template's own words.
        prompt, span = before + text + after, (len(before), len(before) + len(text))
        if prompt not in self._numbers:
            self._numbers[prompt] = len(self.texts)
            self.texts.append(prompt)
        return _Place(self._numbers[prompt], span)

    def tokenize(self, concepts: Iterable[str]) -> None:
        """Tokenizes all prompts so far, and these concepts by themselves."""
        texts = list(dict.fromkeys([*self.texts, *map(self._expand, concepts)]))
        self._located = dict(zip(texts, located_tokens(self._tokenizer, texts), strict=True))

    def read(self, concept: str) -> tuple[int, ...]:
        """The tokens of a concept by itself."""
        return tuple(self._located[self._expand(concept)].ids)

    def beginning(self, place: _Place) -> tuple[int, ...]:
        """The tokens before a concept."""
        first = next(segment.positions[0] for segment in self._layout(place) if segment.kind == "subject")
        return tuple(self._located[self.texts[place.prompt]].ids[:first])

    def stay(self, place: _Place) -> list[_Pair]:
        """Pairs of a whole prompt's tokens with themselves.

        Raises:
            ValueError: if the window cuts it.
        """
        text, window = self.texts[place.prompt], self._tokenizer.model_max_length
        if (n_tokens := len(self._located[text].ids)) > window:
            raise ValueError(
                f"the prompt {text!r} cannot be preserved as a whole: it has {n_tokens} tokens, and the text encoder's"
                f" window holds {window}; shorten it"
            )
        tokens = [(place.prompt, position) for position in range(n_tokens)]
        return [(token, [(token, 1.0)]) for token in tokens]

    def meet(self, goal: Goal, here: _Place, there: list[_Place], tokens: str) -> list[_Pair]:
        """Pairs of the source's tokens with their partners; with several targets, of those that have one in each."""
        partners = [
            self._partners(here, one, tokens, target == "") for target, one in zip(goal.shares, there, strict=True)
        ]
        shared = [position for position in partners[0] if all(position in others for others in partners[1:])]
        return [
            (
                (here.prompt, position),
                [
                    ((one.prompt, own[position]), share)
                    for one, own, share in zip(there, partners, goal.shares.values(), strict=True)
                ],
            )
            for position in shared
        ]

    def _partners(self, here: _Place, there: _Place, tokens: str, is_empty: bool) -> dict[int, int]:
        source = self._layout(here)
        if is_empty:
            return {position: position for position in _positions(source, tokens)}
        if tokens == "all":
            return dict(sorted(align(source, self._layout(there)).items()))
        a, b = _positions(source, tokens), _positions(self._layout(there), tokens)
        # Aligned from the end, the longer list loses its first tokens; paired by offset, its last ones.
        n_pairs = min(len(a), len(b))
        kept = slice(-n_pairs, None) if tokens == "subject" else slice(n_pairs)
        return dict(zip(a[kept], b[kept], strict=True))

    def _find(self, place: _Place) -> list[Segment]:
        text = self.texts[place.prompt]
        return segments(self._tokenizer, text, (place.span,), offsets=self._located[text].offsets)


def _positions(layout: list[Segment], tokens: str) -> tuple[int, ...]:
    groups = group_positions(layout)
    if tokens == "from_subject":
        return groups["all"][groups["last_subject"][0] :]
    return groups[tokens]


def _uses(
    goals: Iterable[Goal], read: Callable[[str], tuple[int, ...]]
) -> Iterator[tuple[tuple[bool, tuple[int, ...]], Use]]:
    """Entries of a ledger, where `read` tells the tokens of a text."""
    for goal in goals:
        targets = [read(target) for target in goal.shares]
        if goal.is_edited and targets == [read(goal.source)]:
            raise ValueError(f"source {goal.source!r} and target {goal.target!r} are the same to the text encoder")
        if len(set(targets)) < len(targets):
            raise ValueError(f"of the targets {', '.join(map(repr, goal.shares))}, two are one to the text encoder")
        yield (goal.is_prompt, read(goal.source)), Use(goal.source, goal.is_edited, goal.is_prompt)


def _aims(
    tokenizer: PreTrainedTokenizerBase, prompts: _Prompts, pairs: list[_Pair], ranges: list[tuple[Goal, slice]]
) -> Iterator[tuple[bytes, Aim]]:
    """Entries of a ledger: of each pair's source token, by all that the encoder reads of it."""
    texts, n_read = prompts.texts, [0] * len(prompts.texts)
    for source, targets in pairs:
        for prompt, position in (source, *(target for target, _ in targets)):
            n_read[prompt] = max(n_read[prompt], position + 1)
    rows = windows(tokenizer, prompts.ids)[0].tolist()
    known = [contexts(row[:n]) for row, n in zip(rows, n_read, strict=True)]
    for goal, here in ranges:
        for (prompt, position), targets in pairs[here]:
            wanted: dict[bytes, float] = {}
            for (other, place), share in targets:
                wanted[known[other][place]] = wanted.get(known[other][place], 0.0) + share
            names = tuple(texts[other] for (other, _), _ in targets)
            aim = Aim(texts[prompt], position, names, {one: round(s, 9) for one, s in wanted.items()}, goal.is_prompt)
            yield known[prompt][position], aim
