"""How far estimates can be trusted: some of them are checked by the exact backend."""

import dataclasses
import math

import numpy
import xarray
from diffusers import DiffusionPipeline

from mediation.badrows import never_ran
from mediation.comparison import compare
from mediation.effects import indirect_effect
from mediation.intervals import mean_interval, nanmean
from mediation.plans import Plan
from mediation.restoration import restoration
from mediation.schema import check

Values = dict[str, numpy.ndarray]


def screened(pipe: DiffusionPipeline, plan: Plan, estimates: Values, share: float) -> Values:
    """Puts exact values in place of the estimates of the largest effects.

    Args:
        pipe: the pipeline.
        plan: what was estimated, of one metric.
        estimates: values of a backend that estimates.
        share: of all places (site, token, window), the part that is measured; rounded up to a whole number.

    Returns:
        The estimates, with `restored` and `sham` exact at the chosen places; exact: as `restored`, NaN elsewhere.
    """
    ranked = _ranked(estimates, plan)
    chosen = ranked[: math.ceil(share * len(ranked) - 1e-9)]
    measured = restoration(pipe, dataclasses.replace(plan, places=frozenset(chosen)))
    is_chosen = numpy.zeros((*plan.shape, 1), bool)  # with the metric
    for place in chosen:
        is_chosen[place] = True
    merged = {name: numpy.where(is_chosen, measured[name], estimates[name]) for name in ("sham", "restored")}
    return estimates | merged | {"exact": measured["restored"]}


def verified(pipe: DiffusionPipeline, plan: Plan, estimates: Values, n_places: int) -> Values:
    """Measures the largest effects, and as many places at random, next to their estimates.

    Returns:
        The estimates; exact: as `restored`, measured, and NaN where it was not; sampled: 1 by (site, token, window)
        where a place was drawn at random among all, 0 elsewhere.
    """
    ranked = _ranked(estimates, plan)
    n_places = min(n_places, len(ranked))
    places = sorted(ranked)  # by index, so that what is drawn does not depend on the estimates
    drawn = {places[i] for i in numpy.random.default_rng(0).choice(len(places), n_places, replace=False)}
    measured = restoration(pipe, dataclasses.replace(plan, places=frozenset(drawn | set(ranked[:n_places]))))
    sampled = numpy.zeros(plan.shape, numpy.int8)
    for place in drawn:
        sampled[place] = 1
    return estimates | {"exact": measured["restored"], "sampled": sampled}


def verification(
    effects: xarray.Dataset,
    k: int = 5,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    method: str = "percentile",
    seed: int = 0,
) -> xarray.Dataset:
    """Tells how well estimates agree with what the exact backend measured at some places.

    Correlation and bias are of the places drawn at random, and so estimate those of the whole map; their intervals tell
    how they vary with the cases, not with the places. Recall is of all places that
    were measured, the largest estimates among them: a large effect that was neither estimated as such nor drawn goes
    unnoticed.

    Args:
        effects: from `mediation.trace(…, backend="attribution_patching", verify=…)`.
        k: how many of the largest exact effects should be among as many of the largest estimates.
        confidence: level of the bootstrap intervals over cases.
        n_resamples: bootstrap resamples.
        method: "percentile" or "BCa".
        seed: of the resampling.

    Returns:
        A Dataset over `statistic`: estimate, low, high. spearman is the rank correlation, bias the mean of estimated
        − exact indirect effect, recall the share of the k largest exact effects that are among the k largest
        estimates. Intervals are NaN if there is a single case.

    Raises:
        ValueError: if nothing was verified, or fewer than k places.

    Example:
        >>> from mediation.effects import _example
        >>> effects = _example()
        >>> effects = effects.assign(exact=effects.restored + 0.5, sampled=("site", [1, 1]))
        >>> verification(effects, k=1).estimate.round(6).to_series().to_dict()
        {'spearman': 1.0, 'bias': -0.5, 'recall': 1.0}
    """
    check(effects, one_metric=True)
    if "exact" not in effects or "sampled" not in effects:
        raise ValueError('this map was not verified: trace with backend="attribution_patching" and verify=…')
    unmeasured = never_ran(effects) | effects.exact.isnull().all(("case", "draw"))
    exact = effects.assign(restored=effects.exact, sham=effects.sham.where(effects.exact.notnull()), absent=unmeasured)
    options = {"confidence": confidence, "n_resamples": n_resamples, "method": method, "seed": seed}
    is_drawn = effects.sampled == 1
    pairs = []
    for found, absent in ((effects, never_ran(effects)), (exact, unmeasured)):
        drawn = {name: found[name].where(is_drawn) for name in ("sham", "restored")}
        pairs.append(found.assign(drawn | {"absent": absent | ~is_drawn}))
    ranks = compare(*pairs, k=1, **options).sel(statistic="spearman")
    largest = compare(effects, exact, k=k, **options).sel(statistic="overlap")
    differences = (indirect_effect(pairs[0]) - indirect_effect(pairs[1])).mean("draw")
    places = [dim for dim in differences.dims if dim != "case"]
    bias = mean_interval(differences.mean(places), **options)
    rows = {
        "spearman": [ranks[name] for name in ("estimate", "low", "high")],
        "bias": bias,
        "recall": [largest[name] for name in ("estimate", "low", "high")],
    }
    columns = numpy.array([[float(value) for value in row] for row in rows.values()]).T
    return xarray.Dataset(
        {name: ("statistic", column) for name, column in zip(("estimate", "low", "high"), columns, strict=True)},
        coords={"statistic": list(rows)},
        attrs=options | {"k": k, "n_drawn": int(is_drawn.sum()), "n_measured": largest.attrs["n_places"]},
    )


def _ranked(estimates: Values, plan: Plan) -> list[tuple[int, int, int]]:
    """Indices (site, token, window) of all places that were estimated, the largest mean indirect effect first."""
    sign = -1 if plan.mode == "knock_out" else 1
    changes = sign * (estimates["restored"] - estimates["sham"])[..., 0]
    mean = nanmean(changes.reshape(-1, *plan.shape), 0)
    order = numpy.argsort(-mean, axis=None, kind="stable")[: int((~numpy.isnan(mean)).sum())]  # NaN is sorted last
    return [tuple(int(i) for i in numpy.unravel_index(place, plan.shape)) for place in order]
