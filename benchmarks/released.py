"""Diff-QuickFix as its authors released it, written anew, with what `editing.quickfix` does otherwise.

Basu et al., arXiv:2310.13730. The release runs the whole text tower over four prompts per concept, takes the last token
before the end token for the subject's last one, and edits it and every later position; its values contain the bias,
which the layer adds again; it solves with an explicit inverse in float32, and preserves nothing. Three things are not
taken over, since they would have other models in view: a text encoder that is not the pipeline's, and a window and an
end token written into the code.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from editing.concepts import TEMPLATES
from editing.edit import Edit, measure
from editing.updates import LowRank
from mediation.hooks import hooked
from mediation.parameters import fingerprint
from mediation.provenance import provenance

REGULARIZATION = 0.01


def released_edit(pipe: DiffusionPipeline, pairs: Mapping[str, str], *, regularization: float = REGULARIZATION) -> Edit:
    """What the release makes of a pipeline with one text encoder, as an edit, not applied.

    Args:
        pipe: the pipeline; it is only read.
        pairs: source concept -> target concept, all solved for at once.
        regularization: lambda.
    """
    path, module = _projection(pipe)
    name = f"text_encoder.{path}.weight"
    change = released_weight(pipe, pairs, regularization=regularization).double() - module.weight.detach().double()
    updates = {name: LowRank(change, torch.eye(change.shape[1]))}
    base = {name: fingerprint(pipe, name)}
    metadata = {"method": "released", "pairs": dict(pairs), "regularization": regularization}
    return Edit(updates, {"parameters": measure(updates, base)}, metadata | {"base": base, **provenance(pipe)})


@torch.no_grad()
def released_weight(
    pipe: DiffusionPipeline, pairs: Mapping[str, str], *, regularization: float = REGULARIZATION
) -> torch.Tensor:
    """The edited weight itself, (d_out, d_in), float32."""
    keys, values, module = [], [], _projection(pipe)[1]
    for source, target in pairs.items():
        (source_keys, _), (_, target_values) = (_read(pipe, module, concept) for concept in (source, target))
        for key, value in zip(source_keys, target_values, strict=True):
            n_pairs = min(len(key), len(value))
            keys.append(key[:n_pairs])
            values.append(value[:n_pairs])
    return released_solution(module.weight, torch.cat(keys), torch.cat(values), regularization)


def released_solution(
    weight: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, regularization: float
) -> torch.Tensor:
    """(lambda W0 + V^T K) (lambda I + K^T K)^-1 in float32, with the inverse spelled out.

    Args:
        weight: (d_out, d_in).
        keys: (key, d_in).
        values: (key, d_out).
        regularization: lambda.
    """
    weight, keys, values = (tensor.to(torch.float32) for tensor in (weight, keys, values))
    return (regularization * weight + values.T @ keys) @ torch.inverse(
        regularization * torch.eye(keys.shape[1]) + keys.T @ keys
    )


def _projection(pipe: DiffusionPipeline) -> tuple[str, nn.Linear]:
    """Path and module of what is edited, spelled out as the release does: looking for it would count as its time."""
    nested = "text_model." if hasattr(pipe.text_encoder, "text_model") else ""
    path = f"{nested}encoder.layers.0.self_attn.out_proj"
    return path, pipe.text_encoder.get_submodule(path)


def _read(
    pipe: DiffusionPipeline, module: nn.Linear, concept: str
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """For each prompt, what the projection receives and gives, from the last token before the end token on."""
    prompts = [template.format(concept) for template in TEMPLATES]
    window = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length, "truncation": True}
    tokens = pipe.tokenizer(prompts, return_tensors="pt", **window)["input_ids"]
    seen = {}

    def note(name: str):
        return lambda tensor: seen.setdefault(name, tensor)

    with hooked([(module, note("values"))], inputs=[(module, note("keys"))]):
        pipe.text_encoder(tokens)
    # argmax finds the first of equals: padding may be the end token, too
    starts = (tokens == pipe.tokenizer.eos_token_id).int().argmax(1) - 1
    return tuple(
        [rows[start:] for rows, start in zip(seen[name], starts.tolist(), strict=True)] for name in ("keys", "values")
    )
