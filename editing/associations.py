"""From prompts to keys and values: what a projection receives for the source, and should answer as for the target.

A projection maps a key k (its input) to a value v = W k. The bias is no part of the value: the projection adds it again
after the edit, so a value that contained it would count it twice.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from editing.concepts import Goal, Request, split
from mediation.cases import group_positions, segments
from mediation.hooks import input_of
from mediation.pipelines import family_of
from mediation.sites import Site

TOKENS = ("last_subject", "subject", "from_subject")
_CHUNK = 256  # prompts per forward: bounds memory when there are thousands


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Tokens that are to be read as other tokens.

    Attributes:
        prompts: the distinct prompts that the tokens are in.
        source: (pair, 2), index of a prompt and position in it.
        target: (pair, 2), likewise; of a preserved token, itself.
        weights: (pair,), float64.
        goals: what each range of pairs is for, the edited concepts first.
        n_edited: how many of the first pairs are edited; the others are preserved.
    """

    prompts: list[str]
    source: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor
    goals: list[tuple[Goal, slice]]
    n_edited: int


@dataclasses.dataclass(frozen=True)
class Associations:
    """Keys and wanted values of one projection, one row per token pair, the edited ones first; all float64 on the CPU.

    Attributes:
        pairs: where they were read.
        keys: (pair, d_in), the projection's input at the source token.
        values: (pair, d_out), W times its input at the target token.
        residuals: (edited pair, d_out), values minus W times keys.
    """

    pairs: TokenPairs
    keys: torch.Tensor
    values: torch.Tensor
    residuals: torch.Tensor


def pair_tokens(pipe: DiffusionPipeline, network: str, request: Request, tokens: str) -> TokenPairs:
    """Finds, in every template, the tokens of each source concept and their partners in the target concept.

    Args:
        pipe: the pipeline, for its tokenizers.
        network: the text encoder that will read the prompts.
        request: concepts, templates, preserved concepts and weights.
        tokens: "last_subject" pairs the concepts' last tokens. "subject" pairs all their tokens, aligned from the
            end; the first tokens of the longer concept have no partner, and are left alone. "from_subject" pairs the
            last tokens and every later position of the window, by offset.

    Raises:
        ValueError: if `tokens` is unknown, concepts contradict each other, or one is truncated.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")
    tokenizer = getattr(pipe, dict(family_of(pipe).text_encoders)[network])
    request.check_distinct(lambda concept: tuple(tokenizer(concept, verbose=False)["input_ids"]))
    expand = _expansion(pipe, tokenizer)
    templates = [tuple(map(expand, split(template))) for template in request.templates]
    prompts: dict[str, int] = {}  # to their index

    @functools.cache  # many sources may share a target
    def place(concept: str, before: str, after: str) -> list[tuple[int, int]]:
        text = expand(concept)
        positions = _positions(tokenizer, before, text, after, tokens)
        prompt = prompts.setdefault(before + text + after, len(prompts))
        return [(prompt, position) for position in positions]

    source, target, weights, goals = [], [], [], []
    for goal in request.goals():
        first = len(source)
        for template in templates:
            a, b = place(goal.source, *template), place(goal.target, *template)
            # Aligned from the end, the longer list loses its first tokens; paired by offset, its last ones.
            n_pairs = min(len(a), len(b))
            kept = slice(-n_pairs, None) if tokens == "subject" else slice(n_pairs)
            source += a[kept]
            target += b[kept]
        weights += [goal.weight] * (len(source) - first)
        goals.append((goal, slice(first, len(source))))
    return TokenPairs(
        prompts=list(prompts),
        source=torch.tensor(source),
        target=torch.tensor(target),
        weights=torch.tensor(weights, dtype=torch.float64),
        goals=goals,
        n_edited=goals[len(request.pairs) - 1][1].stop,
    )


def associate(pipe: DiffusionPipeline, site: Site, pairs: TokenPairs) -> Associations:
    """Reads the keys of all pairs at a site's output projection, and what the projection should answer to them.

    Raises:
        ValueError: if the site's projection is no plain linear layer, or something read is not finite.
    """
    weight = projection(pipe, site)[1].weight.detach().cpu().double()
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weights at {site.name} are not finite: load the pipeline again")
    # Read each token once, however many pairs it is in.
    wanted, rows = torch.unique(torch.cat([pairs.source, pairs.target]), dim=0, return_inverse=True)
    inputs = read_inputs(pipe, site, pairs.prompts, wanted)
    if not torch.isfinite(inputs).all():
        raise ValueError(f"{site.network} gives values that are not finite before {site.name}: check weights and dtype")
    keys, target_keys = inputs[rows].chunk(2)
    values = target_keys @ weight.T
    residuals = values[: pairs.n_edited] - keys[: pairs.n_edited] @ weight.T
    return Associations(pairs, keys, values, residuals)


def projection(pipe: DiffusionPipeline, site: Site) -> tuple[str, nn.Linear]:
    """Path in its network, and module, of the linear layer that gives a site's output.

    Raises:
        ValueError: if that layer is not a plain, loaded linear layer.
    """
    path = f"{site.path}.{family_of(pipe).output_projections[site.network][site.component]}"
    module = getattr(pipe, site.network).get_submodule(path)
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise ValueError(
            f"{site.network}.{path} is a {type(module).__module__}.{type(module).__name__}, not a linear layer in"
            " floating point: unload or fuse adapters, and load the pipeline without quantization"
        )
    if module.weight.is_meta:
        raise ValueError(f"{site.network}.{path} is offloaded: edit the pipeline before offloading it")
    return path, module


@torch.no_grad()
def read_inputs(pipe: DiffusionPipeline, site: Site, prompts: Sequence[str], wanted: torch.Tensor) -> torch.Tensor:
    """Inputs of a site's output projection at given tokens; nothing behind it is computed.

    Args:
        pipe: the pipeline.
        site: a text encoder's site.
        prompts: what the encoder reads, tokenized as the pipeline's own `encode_prompt` does.
        wanted: (token, 2), index of a prompt and position in it, in the order of the prompts.

    Returns:
        (token, d_in), float64 on the CPU.
    """
    _, module = projection(pipe, site)
    encoder = getattr(pipe, site.network)
    tokenizer = getattr(pipe, dict(family_of(pipe).text_encoders)[site.network])
    device = pipe._execution_device
    found = []
    for start in range(0, len(prompts), _CHUNK):
        batch = tokenizer(
            list(prompts[start : start + _CHUNK]),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # Without this flag the pipeline lets padding be read, as CLIP was trained to.
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = batch.attention_mask.to(device) if masked else None
        inputs = input_of(module, functools.partial(encoder, batch.input_ids.to(device), attention_mask=mask))
        here = wanted[(wanted[:, 0] >= start) & (wanted[:, 0] < start + _CHUNK)].to(inputs.device)
        found.append(inputs[here[:, 0] - start, here[:, 1]].cpu().double())  # not every device has float64
    return torch.cat(found)


def _positions(
    tokenizer: PreTrainedTokenizerBase, before: str, concept: str, after: str, tokens: str
) -> tuple[int, ...]:
    # The concept is where the template put it: a search would also find the template's own words.
    span = (len(before), len(before) + len(concept))
    groups = group_positions(segments(tokenizer, before + concept + after, (span,)))
    if tokens == "from_subject":
        return tuple(range(groups["last_subject"][0], tokenizer.model_max_length))
    return groups[tokens]


def _expansion(pipe: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """How the pipeline spells out textual-inversion tokens that stand for several vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return (lambda text: convert(text, tokenizer)) if convert else (lambda text: text)
