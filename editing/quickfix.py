"""Diff-QuickFix: edits a concept in closed form where a text encoder first reads it (Basu et al., arXiv:2310.13730)."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from editing.associations import Associations, associate, pair_tokens, projection
from editing.concepts import Request
from editing.edit import Edit, measure
from editing.parameters import fingerprint
from editing.provenance import provenance
from editing.solvers import check_regularization, ridge
from editing.updates import LowRank
from mediation.pipelines import family_of
from mediation.sites import Site, resolve, sites


def quickfix(
    pipe: DiffusionPipeline,
    pairs: Mapping[str, str],
    *,
    templates: Iterable[str] | None = None,
    preserve: Iterable[str] = (),
    regularization: float = 0.01,
    tokens: str = "last_subject",
    site: Site | str | Sequence[Site | str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Edit:
    """Makes a text encoder read source concepts as target concepts; the pipeline is only read.

    A key k_i is the input of one linear layer at a token of a source prompt; its wanted value v_i = W0 k'_i is what the
    layer, bias apart, gives at the token's partner k'_i in the target prompt. With D the change of the layer's W0,

        minimise over D:  sum_i w_i ||(W0 + D) k_i - v_i||^2 + sum_j w_j ||D p_j||^2 + lambda ||D||^2

    where p_j are the keys of preserved concepts. All concepts are solved for at once, in float64; the rank of the
    change is at most the number of edited keys.

    Args:
        pipe: a pipeline of a supported family; it runs up to the edited layer of its text encoder.
        pairs: source concept -> target concept, in words: {"ink": "noto"}.
        templates: texts with one "{}" each, which every concept is put through; None is the paper's four: "{}",
            "A photo of {}", "An image of {}", "A picture of {}".
        preserve: concepts whose keys are to keep their values, put through the same templates.
        regularization: lambda > 0, in squared units of the keys. Smaller follows the targets more closely and changes
            more; the paper uses 0.01.
        tokens: which tokens are edited. "last_subject": the last token of each concept. "subject": all its tokens,
            aligned from the end; the first tokens of the longer concept have no partner, and are left alone.
            "from_subject": the last token and every later position of the window, by offset, as the paper's code.
        site: self_attention or mlp sites of text encoders, at most one in each, or their names; None is the first
            self-attention of every text encoder, as in the paper.
        weights: concept, edited or preserved -> weight of each of its keys; 1 where absent. More templates, or more
            tokens, make more keys.

    Returns:
        The edit, not applied. Its report has, for each concept and network, the residual ||W K - V|| / ||V|| before
        and after, and the interference ||D P|| / ||W0 P|| on each preserved concept.

    Raises:
        KeyError: if `site` names no site of the pipeline.
        TypeError: if an argument is of another kind than documented.
        ValueError: if an argument is out of range, concepts are empty, equal or contradict each other, one is
            truncated by the text encoder's window, a site is not in a text encoder, or weights are not finite.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> edit = quickfix(pipe, {"ink": "noto"}, preserve=["cat"])
        >>> edit
        <Edit by quickfix: 1 parameter, rank 4>
        >>> before, after = (edit.report["residuals"][0][when] for when in ("before", "after"))
        >>> after < before
        True
    """
    clock = _Clock()
    family_of(pipe)
    request = Request.of(pairs, templates, preserve, weights)
    regularization = check_regularization(regularization)
    chosen = _text_sites(pipe, site)
    # Find all tokens first: a truncated concept must fail before anything runs.
    found = [pair_tokens(pipe, site.network, request, tokens) for site in chosen]
    clock.lap("tokens")

    updates, base, report = {}, {}, {"residuals": [], "interference": []}
    for site, token_pairs in zip(chosen, found, strict=True):
        known = associate(pipe, site, token_pairs)
        clock.lap("keys")
        factors = ridge(known.keys, known.residuals, regularization=regularization, weights=token_pairs.weights)
        update = LowRank(*factors)
        clock.lap("solve")
        name = f"{site.network}.{projection(pipe, site)[0]}.weight"
        updates[name], base[name] = update, fingerprint(pipe, name)
        for kind, entries in _outcome(site, known, update).items():
            report[kind] += entries
        clock.lap("report")
    report |= {"parameters": measure(updates, base), "milliseconds": clock.milliseconds}
    metadata = {
        "method": "quickfix",
        "pairs": request.pairs,
        "templates": list(request.templates),
        "preserve": list(request.preserve),
        "regularization": regularization,
        "tokens": tokens,
        "weights": request.weights,
        "sites": [site.name for site in chosen],
        "base": base,
        **provenance(pipe),
    }
    return Edit(updates, report, metadata)


def _text_sites(pipe: DiffusionPipeline, site: Site | str | Sequence[Site | str] | None) -> list[Site]:
    networks = [network for network, _ in family_of(pipe).text_encoders]
    if site is None:
        return [sites(pipe, network=network, component="self_attention")[0] for network in networks]
    chosen = [site for group in resolve(pipe, site) for site in group]
    for site in chosen:
        if site.network not in networks:
            raise ValueError(
                f"quickfix edits text encoders ({', '.join(networks)}), and {site.name} is in {site.network}"
            )
        if sum(other.network == site.network for other in chosen) > 1:
            raise ValueError(
                f"two sites of {site.network} cannot be solved for together, since the first changes the keys of the"
                " second: make one edit, and the next inside `with edit.applied(pipe):`, then add them"
            )
    return chosen


def _outcome(site: Site, known: Associations, update: LowRank) -> dict[str, list[dict]]:
    """Residuals of the edited concepts and interference with the preserved ones, with the update as it is stored."""
    changes = update.times(known.keys)
    outcome: dict[str, list[dict]] = {"residuals": [], "interference": []}
    for goal, rows in known.pairs.goals:
        wanted = torch.linalg.vector_norm(known.values[rows]).clamp(min=torch.finfo(torch.float64).tiny)
        entry = {"network": site.network, "n_keys": rows.stop - rows.start}
        if rows.stop <= known.pairs.n_edited:
            residuals = known.residuals[rows]
            before, after = (torch.linalg.vector_norm(r) / wanted for r in (residuals, residuals - changes[rows]))
            names = {"source": goal.source, "target": goal.target}
            outcome["residuals"].append(names | entry | {"before": float(before), "after": float(after)})
        else:
            moved = float(torch.linalg.vector_norm(changes[rows]) / wanted)
            outcome["interference"].append({"concept": goal.source} | entry | {"change": moved})
    return outcome


class _Clock:
    """Milliseconds spent in each stage, summed over its laps."""

    def __init__(self):
        self.milliseconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + 1000 * (now - self._last)
        self._last = now
