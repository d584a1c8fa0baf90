"""CAD-Erase and CAD-Amplify: set the weights to 0 that make, or hinder, a concept (Nguyen et al., arXiv:2412.02542)."""

import dataclasses
import math
import numbers

import torch

from editing.clock import Clock
from editing.edit import Edit, measure
from editing.updates import Sparse
from mediation.weightscores import Attribution

PER = ("row", "matrix", "model")
CONTROLS = ("random", "magnitude", "sign_flipped")


def cad_erase(attribution: Attribution, *, ratio: float = 0.001, per: str = "row") -> Edit:
    """Sets the weights to 0 that contribute most to drawing a concept: those of the largest positive scores.

    To 0 exactly, whatever dtype the pipeline has them in and whatever other edits did to them before. Ablations that
    share weights take them once, in a sum as one on top of the other; `scaled(s)` leaves the share 1 − s of each.

    Setting w_i to 0 takes its score off J = E ||e(x_t, base, t) − e(x_t, concept, t)||², to first order. Of each group
    of n weights, the floor(ratio · n) best are taken, but at least one, so that groups narrower than 1/ratio are not
    left out; and never one of the other sign. The report tells how many that were.

    Args:
        attribution: from `mediation.attribute(…, objective="erase")`.
        ratio: share of the weights, above 0 and at most 1.
        per: what a group is: a "row" of a matrix (of a convolution, one output channel; a vector is one row), a whole
            "matrix", or the "model", all that was scored.

    Returns:
        The edit, not applied. Its report has J before, and as the scores predict it after.

    Raises:
        TypeError: if `attribution` is none.
        ValueError: if it is of another objective, an argument is out of range, or no score has the right sign.

    Example:
        >>> import editing, mediation
        >>> pipe = mediation.load_pipeline()
        >>> found = mediation.attribute(pipe, "ink", parameters="unet.mid.0.feed_forward", num_inference_steps=2)
        >>> edit = editing.cad_erase(found, ratio=0.01, per="matrix")
        >>> edit
        <Edit by cad_erase: 2 parameters, 4,423 weights>
        >>> edit.report["objective"]["predicted"] < edit.report["objective"]["before"]
        True
    """
    return _ablate(attribution, "erase", ratio, per)


def cad_amplify(attribution: Attribution, *, ratio: float = 0.001, per: str = "row") -> Edit:
    """Sets the weights to 0 that hinder a concept most: those of the most negative scores, exactly as `cad_erase` does.

    Setting w_i to 0 takes its score off J = −E ||noise − e(x_t, concept, t)||², to first order.

    Args:
        attribution: from `mediation.attribute(…, objective="amplify")`.
        ratio: as for `cad_erase`.
        per: as for `cad_erase`.

    Returns:
        The edit, not applied. Its report has J before, and as the scores predict it after.

    Raises:
        TypeError, ValueError: as `cad_erase` does.

    Example:
        >>> import editing, mediation
        >>> options = {"objective": "amplify", "parameters": "unet.mid.0.feed_forward", "num_inference_steps": 2}
        >>> found = mediation.attribute(mediation.load_pipeline(), "ink", **options)
        >>> editing.cad_amplify(found, ratio=0.01, per="model")
        <Edit by cad_amplify: 2 parameters, 4,423 weights>
    """
    return _ablate(attribution, "amplify", ratio, per)


def control(attribution: Attribution, kind: str, *, seed: int = 0) -> Attribution:
    """Scores that a method which does not know the concept could have given: what CAD must beat.

    Each parameter keeps the scores that it has, but for "sign_flipped", and so the number of weights that an ablation
    takes per matrix; only which weights have them changes.

    Args:
        attribution: the scores to replace.
        kind: "random" puts each parameter's scores in random order; "magnitude" ranks weights by their absolute value,
            the largest being the first to go; "sign_flipped" takes all scores with the other sign.
        seed: of the random order.

    Raises:
        ValueError: if `kind` is none of these.
    """
    if kind not in CONTROLS:
        raise ValueError(f"kind must be one of {', '.join(CONTROLS)}; got {kind!r}")
    random = torch.Generator().manual_seed(seed)
    sign = _sign(attribution)
    scores = {}
    for name, score in attribution.scores.items():
        flat = score.flatten()
        if kind == "random":
            flat = flat[torch.randperm(len(flat), generator=random)]
        elif kind == "magnitude":
            order = attribution.weights[name].flatten().float().abs().argsort(descending=True, stable=True)
            flat = torch.empty_like(flat).index_copy_(0, order, sign * (sign * flat).sort(descending=True).values)
        else:
            flat = -flat
        scores[name] = flat.view_as(score)
    metadata = attribution.metadata | {"control": kind} | ({"control_seed": seed} if kind == "random" else {})
    return dataclasses.replace(attribution, scores=scores, metadata=metadata)


def _ablate(attribution: Attribution, objective: str, ratio: float, per: str) -> Edit:
    clock = Clock()
    if not isinstance(attribution, Attribution):
        raise TypeError(f"expected what mediation.attribute returns, got {type(attribution).__name__}")
    if (given := attribution.metadata["objective"]) != objective:
        raise ValueError(f"these scores are of the objective {given!r}: use editing.cad_{given}, or attribute again")
    if not isinstance(ratio, numbers.Real) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(f"ratio is a share of the weights, above 0 and at most 1; got {ratio!r}")
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(PER)}; got {per!r}")
    sign = _sign(attribution)
    chosen = _choose({name: sign * score for name, score in attribution.scores.items()}, float(ratio), per)
    clock.lap("choose")
    if not chosen:
        wanted = "positive" if sign > 0 else "negative"
        raise ValueError(f"no score is {wanted}: there is nothing to set to 0")
    updates = {name: _zeroing(attribution.weights[name], indices) for name, indices in chosen.items()}
    base = {name: attribution.base[name] for name in updates}
    report = {
        "n_changed": sum(map(len, chosen.values())),
        "n_weights": sum(score.numel() for score in attribution.scores.values()),
        "parameters": measure(updates, base),
    }
    if "control" not in attribution.metadata:  # whose scores are those of other weights
        before = attribution.metadata["value"]
        gains = (attribution.scores[name].flatten()[indices].double().sum() for name, indices in chosen.items())
        report["objective"] = {"before": before, "predicted": before - float(sum(gains))}
    clock.lap("report")
    metadata = {"method": f"cad_{objective}", "ratio": float(ratio), "per": per, **attribution.metadata, "base": base}
    return Edit(updates, report | clock.report, metadata)


def _sign(attribution: Attribution) -> int:
    """The sign of scores that are ablated."""
    return 1 if attribution.metadata["objective"] == "erase" else -1


def _zeroing(weight: torch.Tensor, indices: torch.Tensor) -> Sparse:
    """The change that sets these weights to 0."""
    return Sparse(weight.shape, indices, -weight.flatten()[indices].float(), torch.ones(len(indices)))


def _choose(scores: dict[str, torch.Tensor], ratio: float, per: str) -> dict[str, torch.Tensor]:
    """Ascending positions of the weights to ablate in each flattened parameter that has any."""
    if per == "model":
        places = _top(torch.cat([score.flatten() for score in scores.values()])[None], ratio)
        chosen, start = {}, 0
        for name, score in scores.items():
            stop = start + score.numel()
            chosen[name] = places[(places >= start) & (places < stop)] - start
            start = stop
    else:
        chosen = {name: _top(_groups(score, per), ratio) for name, score in scores.items()}
    return {name: indices for name, indices in chosen.items() if len(indices)}


def _groups(score: torch.Tensor, per: str) -> torch.Tensor:
    """A parameter's scores, (group, weight)."""
    return score.flatten(1) if per == "row" and score.ndim > 1 else score.reshape(1, -1)


def _top(groups: torch.Tensor, ratio: float) -> torch.Tensor:
    """Ascending flat positions of the largest positive entries of each group (group, weight)."""
    n_groups, width = groups.shape
    # The small term keeps products such as 0.29 * 100 from falling below what they mean.
    n_best = max(1, math.floor(ratio * width + 1e-9))
    best = groups.topk(n_best, dim=1)
    places = best.indices + width * torch.arange(n_groups)[:, None]
    return places[best.values > 0].sort().values
