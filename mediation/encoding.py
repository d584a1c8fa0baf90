"""What the denoiser reads of a prompt, in every row: the subject corrupted in some, text sites changed in some."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedTokenizerBase

from mediation import interventions
from mediation.cases import Case, ZeroSubject, align, group_positions, segments
from mediation.hooks import Change
from mediation.interventions import Copy
from mediation.pipelines import family_of, tokenizers_of
from mediation.rows import CLEAN, CORRUPTED, N_CONTROLS, Intervention, Target, intervening


@torch.no_grad()
def encode_rows(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention]
) -> dict[str, torch.Tensor]:
    """Keyword arguments of the pipeline's call for the clean row, the corrupted row and one row per intervention."""
    return encode_in_graph(pipe, case, draw, rows)


def encode_in_graph(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention]
) -> dict[str, torch.Tensor]:
    """`encode_rows` for those who want gradients."""
    corrupted = [CORRUPTED, *(i for i, row in enumerate(rows, start=N_CONTROLS) if row.sham == CORRUPTED)]
    prompts = [case.prompt] * (N_CONTROLS + len(rows))
    for row in corrupted:
        prompts[row] = case.corrupted_prompt
    where = getattr(case.corruption, "where", None)  # replacing the subject has changed the prompt instead

    def copies(target: Target, features: slice) -> list[Copy]:
        taken = target.intervention
        return [Copy(taken.donor, target.row, taken.positions(target.site.network), features)]

    inputs = _corrupted_inputs(pipe, case, draw, corrupted) if where == "input" else ()
    with intervening(pipe, rows, list(tokenizers_of(pipe)), copies, also=inputs):
        conditioning = family_of(pipe).encode(pipe, prompts)
    return _corrupted_outputs(pipe, case, draw, corrupted, conditioning) if where == "output" else conditioning


def clean_groups(tokenizer: PreTrainedTokenizerBase, case: Case) -> dict[str, tuple[int, ...]]:
    """Token positions of the clean prompt by group name."""
    return group_positions(segments(tokenizer, case.prompt, case.spans))


def token_pairs(
    tokenizer: PreTrainedTokenizerBase, case: Case, tokens: Sequence[str | int]
) -> list[tuple[tuple[int, int], ...]]:
    """For each group or position, (clean position, corrupted position) of those with a partner in the corrupted prompt.

    Raises:
        ValueError: if a subject is truncated in either prompt.
    """
    clean = segments(tokenizer, case.prompt, case.spans)
    partners = align(clean, segments(tokenizer, case.corrupted_prompt, case.corrupted_spans))
    groups = group_positions(clean)
    chosen = (groups[token] if isinstance(token, str) else (token,) for token in tokens)
    return [tuple((p, partners[p]) for p in positions if p in partners) for positions in chosen]


def _corrupted_inputs(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[int]
) -> list[tuple[nn.Module, Change]]:
    """Corrupts the subject's tokens as every text encoder embeds them."""
    return [
        _corrupted_embedding(getattr(pipe, encoder).get_input_embeddings(), tokenizer, case, (draw, stream), rows)
        for stream, (encoder, tokenizer) in enumerate(tokenizers_of(pipe).items())
    ]


def _corrupted_embedding(table, tokenizer, case: Case, number: tuple[int, int], rows) -> tuple[nn.Module, Change]:
    positions = clean_groups(tokenizer, case)["subject"]
    return table, lambda output: _corrupt(case, number, output, rows, positions, table.weight)


def _corrupted_outputs(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[int], conditioning: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Corrupts what the denoiser reads of the subject's tokens, and all of a pooled embedding."""
    conditioning = dict(conditioning)
    tokenizers = tokenizers_of(pipe)
    for stream, (keyword, encoder, features) in enumerate(family_of(pipe).text_outputs(pipe)):
        states = conditioning[keyword] if encoder else conditioning[keyword][:, None]
        positions = clean_groups(tokenizers[encoder], case)["subject"] if encoder else (0,)
        states = _corrupt(case, (draw, stream), states, rows, positions, states[CLEAN][..., features], features)
        conditioning[keyword] = states if encoder else states[:, 0]
    return conditioning


def _corrupt(
    case: Case,
    number: tuple[int, int],
    states: torch.Tensor,
    rows: Sequence[int],
    positions: Sequence[int],
    like: torch.Tensor,
    features: slice = slice(None),
) -> torch.Tensor:
    """Zeros, or adds noise in standard deviations of `like`; `number` is the noise's draw and stream."""
    if isinstance(case.corruption, ZeroSubject):
        return interventions.zero(states, rows, positions, features)
    noise = case.corruption.noise((len(positions), like.shape[-1]), case.seed, *number).to(like.device)
    return interventions.add(states, rows, positions, case.corruption.scale * like.float().std() * noise, features)
