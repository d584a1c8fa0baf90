"""From prompts to keys and values: what a projection receives for the source, and should answer as for the target.

A projection maps a key k (its input) to a value v = W k. The bias is no part of the value: the projection adds it again
after the edit, so a value that contained it would count it twice.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from editing.pairing import TokenPairs, windows
from editing.updates import LowRank
from mediation.hooks import input_of
from mediation.parameters import check_precision
from mediation.pipelines import family_of, tokenizers_of
from mediation.sites import Site, resolve, sites

_CHUNK = 256  # prompts per forward: bounds memory when there are thousands


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


def associate(pipe: DiffusionPipeline, site: Site, pairs: TokenPairs) -> Associations:
    """Reads the keys of all pairs at a site's output projection, and what the projection should answer to them.

    Raises:
        ValueError: if the site's projection is no plain linear layer, or something read is not finite.
    """
    stored = projection(pipe, site)[1].weight
    weight = stored.detach().cpu().double()
    if not all_finite(weight, stored.dtype):
        raise ValueError(f"the weights at {site.name} are not finite: load the pipeline again")
    # Read each token once, however many pairs it is in.
    wanted, rows = torch.unique(torch.cat([pairs.source, pairs.target]), dim=0, return_inverse=True)
    inputs = read_inputs(pipe, site, pairs.ids, wanted)
    if not torch.isfinite(inputs).all():
        raise ValueError(f"{site.network} gives values that are not finite before {site.name}: check weights and dtype")
    keys, targets = inputs[rows].split([len(pairs.source), len(pairs.target)])
    values = pairs.averaged(targets) @ weight.T
    residuals = values[: pairs.n_edited] - keys[: pairs.n_edited] @ weight.T
    return Associations(pairs, keys, values, residuals)


def outcome(where: Mapping[str, str], known: Associations, update: LowRank) -> dict[str, list[dict]]:
    """For a report: residuals of what is edited and interference with what is preserved, by the update as stored.

    Args:
        where: what each entry says of its place, as the network.
        known: keys and wanted values.
        update: the change.
    """
    changes = update.times(known.keys)
    found: dict[str, list[dict]] = {"residual": [], "interference": []}
    for goal, rows in known.pairs.goals:
        wanted = torch.linalg.vector_norm(known.values[rows]).clamp(min=torch.finfo(torch.float64).tiny)
        entry = {**where, "n_keys": rows.stop - rows.start}
        if rows.stop <= known.pairs.n_edited:
            residuals = known.residuals[rows]
            before, after = (torch.linalg.vector_norm(r) / wanted for r in (residuals, residuals - changes[rows]))
            names = {"source": goal.source, "target": goal.target}
            found["residual"].append(names | entry | {"before": float(before), "after": float(after)})
        else:
            moved = float(torch.linalg.vector_norm(changes[rows]) / wanted)
            kind = "prompt" if goal.is_prompt else "concept"
            found["interference"].append({kind: goal.source} | entry | {"change": moved})
    return found


def all_finite(weight: torch.Tensor, stored: torch.dtype) -> bool:
    """Whether a weight has no NaN and no infinity, given in float64 and the dtype that it is stored in.

    Of a narrower dtype the sum tells, in a tenth of the time: no finite values add up to more than float64 can hold.
    """
    return bool(torch.isfinite(weight if stored == torch.float64 else weight.sum()).all())


def text_sites(pipe: DiffusionPipeline, site: Site | str | Sequence[Site | str] | None) -> list[Site]:
    """The sites that Diff-QuickFix edits, in execution order; None is the first self-attention of each text encoder.

    Raises:
        KeyError: if the pipeline has no such site.
        ValueError: if a site is in no text encoder, or in a layer that nothing reads, or is given twice.
    """
    family = family_of(pipe)
    networks = [network for network, _ in family.text_encoders]
    if site is None:
        return [sites(pipe, network=network, component="self_attention")[0] for network in networks]
    chosen = [site for group in resolve(pipe, site) for site in group]
    for site in chosen:
        if site.network not in networks:
            raise ValueError(
                f"quickfix edits text encoders ({', '.join(networks)}), and {site.name} is in {site.network}"
            )
        n_layers = getattr(pipe, site.network).config.num_hidden_layers
        n_read = n_layers - family.n_unread_layers.get(site.network, 0)
        if site.layer >= n_read:
            raise ValueError(
                f"an edit at {site.name} would change no picture: a {type(pipe).__name__} reads what the first {n_read}"
                f" of {n_layers} layers of its {site.network} make"
            )
        if chosen.count(site) > 1:
            raise ValueError(f"the site {site.name} was given twice")
        projection(pipe, site)  # raises if it has none
    order = [site for network in networks for site in sites(pipe, network=network)]
    return sorted(chosen, key=order.index)


def projection(pipe: DiffusionPipeline, site: Site) -> tuple[str, nn.Linear]:
    """Path in its network, and module, of the linear layer that gives a site's output.

    Raises:
        ValueError: if there is no such layer, or it is not a plain, loaded linear layer.
    """
    projections = family_of(pipe).output_projections[site.network]
    if site.head is not None or site.component not in projections:
        raise ValueError(f"{site.name} has no output projection of its own: edit a whole {' or '.join(projections)}")
    path = f"{site.path}.{projections[site.component]}"
    return path, plain_linear(pipe, site.network, path)


def parameter_name(pipe: DiffusionPipeline, site: Site) -> str:
    """The name in the pipeline of the weight that an edit at a site changes; raises as `projection` does."""
    return f"{site.network}.{projection(pipe, site)[0]}.weight"


def plain_linear(pipe: DiffusionPipeline, network: str, path: str) -> nn.Linear:
    """The linear layer at a path of a network.

    Raises:
        ValueError: if what is there is not a plain, loaded linear layer.
    """
    module = getattr(pipe, network).get_submodule(path)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{network}.{path} is a {type(module).__module__}.{type(module).__name__}, not a linear layer: unload"
            " or fuse adapters, and load the pipeline without quantization"
        )
    check_precision(f"{network}.{path}.weight", module.weight)
    if module.weight.is_meta:
        raise ValueError(f"{network}.{path} is offloaded: edit the pipeline before offloading it")
    return module


@torch.no_grad()
def read_inputs(
    pipe: DiffusionPipeline, site: Site, ids: Sequence[Sequence[int]], wanted: torch.Tensor
) -> torch.Tensor:
    """Inputs of a site's output projection at given tokens; neither what is behind it nor unread tokens are computed.

    Only the encoder's own device counts. If it is offloaded as a whole, its hook moves what it is given along with it.

    Args:
        pipe: the pipeline.
        site: a text encoder's site.
        ids: of each prompt's tokens, as `TokenPairs` has them; windows are made of them as `encode_prompt` does.
        wanted: (token, 2), index of a prompt and position in it, in the order of the prompts.

    Returns:
        (token, d_in), float64 on the CPU.
    """
    _, module = projection(pipe, site)
    encoder = getattr(pipe, site.network)
    # Without this flag the pipeline lets padding be read, as CLIP was trained to.
    masked = getattr(encoder.config, "use_attention_mask", False)
    causal = type(encoder).__name__ in family_of(pipe).causal_text_encoders
    found = []
    for start in range(0, len(ids), _CHUNK):
        tokens, mask = windows(tokenizers_of(pipe)[site.network], ids[start : start + _CHUNK])
        here = wanted[(wanted[:, 0] >= start) & (wanted[:, 0] < start + _CHUNK)]
        read = slice(int(here[:, 1].max()) + 1 if causal and len(here) else None)
        device = module.weight.device  # offloading moves the encoder when it first runs
        mask = mask[:, read].to(device) if masked else None
        run = functools.partial(encoder, tokens[:, read].to(device), attention_mask=mask)
        inputs = input_of(module, run)
        found.append(inputs[here[:, 0] - start, here[:, 1]].cpu().double())  # not every device has float64
    return torch.cat(found)
