"""Edits of what a denoiser reads of text: closed-form changes of the to_k and to_v of its cross-attentions.

UCE (Gandikota et al., arXiv:2308.14761), TIME (Orgad et al., arXiv:2303.08084) and LocoEdit (Basu et al.,
arXiv:2405.01008) minimise one objective. They differ in the tokens they edit, in the layers, and in lambda.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import nn

from editing.assembly import closed_form_edit
from editing.associations import Associations, outcome, plain_linear
from editing.clock import Clock
from editing.concepts import Prompt, Request
from editing.edit import Edit
from editing.pairing import TokenPairs, pair_tokens
from editing.regularization import Regularization, checked_lambda, choose_lambda
from editing.solvers import dual_keys, narrowed, orthonormal
from editing.updates import LowRank
from mediation.parameters import fingerprint
from mediation.pipelines import family_of
from mediation.sites import Site, resolve, sites

_CHUNK = 64  # prompts per run of the text encoders


@dataclasses.dataclass(frozen=True)
class _Method:
    tokens: str
    regularization: float
    needs_layers: bool = False


_METHODS = {
    "uce": _Method(tokens="from_subject", regularization=0.5),
    "loco": _Method(tokens="last_subject", regularization=0.01, needs_layers=True),
    "time": _Method(tokens="all", regularization=0.1),
}


def cross_attention_edit(
    pipe: DiffusionPipeline,
    pairs: Mapping[str, str | Iterable[str] | Mapping[str, float]],
    *,
    method: str = "uce",
    preserve: Iterable[str | Prompt] = (),
    layers: Sequence[int | Site | str] | None = None,
    templates: Iterable[str] | None = None,
    tokens: str | None = None,
    regularization: Regularization | None = None,
    weights: Mapping[str, float] | None = None,
) -> Edit:
    """Makes cross-attentions read source concepts as target concepts, or as nothing; the pipeline is only read.

    A key k_i is what the text encoders make of a source's token; k'_i is that of its partner in the target. With D the
    change of one matrix W0, to_k or to_v of one layer,

        minimise over D:  sum_i w_i ||(W0 + D) k_i - W0 k'_i||^2 + sum_j w_j ||D p_j||^2 + lambda ||D||^2

    where p_j are the keys of what is preserved. All matrices read the same keys, so one factorisation solves for all:
    D = W0 M, with M the same for each.

    Args:
        pipe: a pipeline whose denoiser has cross-attentions; its text encoders run once over the prompts.
        pairs: source concept -> target concept. The target "" erases: the source's tokens are read as those of the
            empty prompt at the same positions. A broader target ("art" for an artist) moderates. Several targets, as
            {"doctor": ["man doctor", "woman doctor"]}, debias (UCE): the source is read as their mean, or, with shares
            as {"man doctor": 1, "woman doctor": 2}, as their weighted mean.
        method: "uce" edits the last token of each concept and all later ones, with lambda 0.5; "loco" the last token,
            in given layers, with lambda 0.01; "time" aligns the whole windows, with lambda 0.1.
        preserve: what is to be read as before: concepts, put through the templates, or `Prompt(text)`.
        layers: cross-attentions by their number in execution order, or as sites or their names, such as those that
            `mediation.top_sites` returns. None is every layer; "loco" must be told.
        templates: texts with one "{}" each, which every concept is put through; None is "{}" alone.
        tokens: which tokens are edited, as for `quickfix`; None is the method's.
        regularization: as for `quickfix`; None is the method's.
        weights: concept, edited or preserved -> weight of each of its keys; 1 where absent.

    Returns:
        The edit, not applied. Its report has residuals ||W K - V|| / ||V|| of each concept before and after, and
        interference ||D P|| / ||W0 P||, where norms run over all edited matrices together.

    Raises:
        KeyError: if `layers` names no site of the pipeline.
        TypeError: if an argument is of another kind than documented.
        ValueError: if an argument is out of range, as for `quickfix`, or a site is no cross-attention, or the
            pipeline's text encoders do not agree on the positions of tokens.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> edit = cross_attention_edit(pipe, {"ink": ""}, preserve=["noto"])
        >>> with edit.applied(pipe):
        ...     image = pipe("a cat in the style of ink", num_inference_steps=2).images[0]
    """
    clock, family = Clock(), family_of(pipe)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    defaults = _METHODS[method]
    if defaults.needs_layers and layers is None:
        raise ValueError(f'method="{method}" edits few layers: pass their numbers, or the sites that a trace found')
    request = Request.of(pairs, ("{}",) if templates is None else templates, preserve, weights, any_target=True)
    regularization = defaults.regularization if regularization is None else regularization
    chosen = _cross_attentions(pipe, layers)
    token_pairs = _pair_tokens(pipe, request, defaults.tokens if tokens is None else tokens)
    regularization = checked_lambda(regularization, token_pairs)
    clock.lap("tokens")

    matrices = _matrices(pipe, chosen)
    keys, target_keys = _read(pipe, token_pairs)
    clock.lap("keys")
    together = _together(matrices)
    shifts = (target_keys - keys)[: token_pairs.n_edited]
    known = Associations(token_pairs, keys, target_keys @ together.T, shifts @ together.T)
    value, strength = choose_lambda(regularization, known)
    options = {"regularization": value, "weights": token_pairs.weights, "n_edited": token_pairs.n_edited}
    up, down = narrowed(*orthonormal(shifts.T, dual_keys(keys, **options)))
    updates = {name: LowRank(*narrowed(_weight(matrix) @ up, down)) for name, matrix in matrices.items()}
    clock.lap("solve")
    base = {name: fingerprint(pipe, name) for name in updates}
    report = outcome({"network": family.denoiser}, known, LowRank(together @ up, down))
    report["regularization"] = {family.denoiser: strength}
    options = {"tokens": defaults.tokens if tokens is None else tokens, "layers": [site.name for site in chosen]}
    options |= {"method": method, "regularization": regularization}
    return closed_form_edit(pipe, request, updates, base, report, clock, **options)


def _cross_attentions(pipe: DiffusionPipeline, layers: Sequence[int | Site | str] | None) -> list[Site]:
    every = sites(pipe, network=family_of(pipe).denoiser, component="cross_attention")
    if layers is None:
        return every
    if isinstance(layers, int | Site | str):
        layers = [layers]
    named = []
    for layer in layers:
        is_number = isinstance(layer, int) and not isinstance(layer, bool)
        if is_number and layer not in range(len(every)):
            raise ValueError(f"cross-attention layers are numbered 0 to {len(every) - 1} here, got {layer}")
        named.append(every[layer] if is_number else layer)
    chosen = [site for group in resolve(pipe, named) for site in group]
    for site in chosen:
        if site not in every:
            raise ValueError(f"layers must be whole cross-attentions of the denoiser, got {site.name}")
        if chosen.count(site) > 1:
            raise ValueError(f"the layer {site.name} was given twice")
    return chosen


def _matrices(pipe: DiffusionPipeline, chosen: Sequence[Site]) -> dict[str, nn.Linear]:
    """The layers' matrices that read text, by parameter name."""
    family = family_of(pipe)
    doors = family.text_doors(getattr(pipe, family.denoiser))
    matrices = {
        f"{site.network}.{door}.weight": plain_linear(pipe, site.network, door)
        for site in chosen
        for door in doors
        if door.startswith(f"{site.path}.")
    }
    for name, matrix in matrices.items():
        if not torch.isfinite(matrix.weight).all():
            raise ValueError(f"{name} is not finite: load the pipeline again")
    return matrices


def _pair_tokens(pipe: DiffusionPipeline, request: Request, tokens: str) -> TokenPairs:
    found = [pair_tokens(pipe, network, request, tokens) for network, _ in family_of(pipe).text_encoders]
    for other in found[1:]:
        if not (torch.equal(found[0].source, other.source) and torch.equal(found[0].target, other.target)):
            raise ValueError(
                "the pipeline's text encoders split these concepts into different numbers of tokens, so that a position"
                " means another token in each: choose other words"
            )
    return found[0]


@torch.no_grad()
def _read(pipe: DiffusionPipeline, pairs: TokenPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser reads at source tokens, and should read there, each (pair, d_in), float64 on the CPU."""
    wanted, rows = torch.unique(torch.cat([pairs.source, pairs.target]), dim=0, return_inverse=True)
    found = []
    for start in range(0, len(pairs.prompts), _CHUNK):
        states = family_of(pipe).encode(pipe, pairs.prompts[start : start + _CHUNK])["prompt_embeds"]
        here = wanted[(wanted[:, 0] >= start) & (wanted[:, 0] < start + _CHUNK)]
        found.append(states[here[:, 0] - start, here[:, 1]].cpu().double())
    tokens = torch.cat(found)
    if not torch.isfinite(tokens).all():
        raise ValueError("the text encoders give values that are not finite: check weights and dtype")
    keys, targets = tokens[rows].split([len(pairs.source), len(pairs.target)])
    return keys, pairs.averaged(targets)


def _together(matrices: Mapping[str, nn.Linear]) -> torch.Tensor:
    """A square matrix that makes of every key a value as long as all matrices together do."""
    gram = sum(weight.T @ weight for weight in map(_weight, matrices.values()))
    squares, directions = torch.linalg.eigh(gram)
    return squares.clamp(min=0).sqrt()[:, None] * directions.T


def _weight(matrix: nn.Linear) -> torch.Tensor:
    return matrix.weight.detach().cpu().double()
