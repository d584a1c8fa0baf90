"""Causal effects from the values of a trace: total and indirect effects, intervals, top sites."""

import numpy
import xarray

from mediation.badrows import without_bad_rows
from mediation.intervals import check_interval, mean_interval
from mediation.schema import check


def total_effect(effects: xarray.Dataset) -> xarray.DataArray:
    """TE = m(clean) − m(corrupted), by (case, draw[, metric]).

    Raises:
        ValueError: if `effects` is not a Dataset that `mediation.trace` returns.

    Example:
        >>> total_effect(_example()).values.tolist()
        [[2.0]]
    """
    check(effects)
    return (effects.clean - effects.corrupted).rename("total_effect")


def indirect_effect(effects: xarray.Dataset, *, normalize: bool = False) -> xarray.DataArray:
    """IE = m(restored) − m(corrupted), signed, by (case, draw, site[, token][, window][, metric]).

    Of knocked-out runs, it is IE = m(clean) − m(knocked out): what is lost without the site. Either way, a site that
    carries everything has IE = TE, and one that does not matter has IE = 0.

    Args:
        effects: from `mediation.trace`.
        normalize: divides by the mean total effect of the cases that have the place, so that the mean over draws, then
            over cases, is the ratio of means AIE / ATE that `summarize` reports. Runs (case, draw) whose |TE| does not
            exceed the noise floor are masked, and counted in the attribute `n_masked`, for each metric.

    Raises:
        ValueError: if `effects` is not a Dataset that `mediation.trace` returns.

    Example:
        >>> indirect_effect(_example(), normalize=True).values.tolist()
        [[[0.5, 0.0]]]
    """
    check(effects)
    if is_knock_out(effects):
        indirect = (effects.clean - effects.restored).rename("indirect_effect")
    else:
        indirect = (effects.restored - effects.corrupted).rename("indirect_effect")
    if not normalize:
        return indirect
    indirect, total = masked_effects(without_bad_rows(effects))
    n_masked = numpy.isnan(total).sum(("case", "draw")).values.tolist()
    normalized = indirect / total.where(~numpy.isnan(indirect)).mean("draw").mean("case")
    return normalized.rename("indirect_effect").assign_attrs(n_masked=n_masked)


def masked_effects(effects: xarray.Dataset) -> tuple[xarray.DataArray, xarray.DataArray]:
    """Indirect and total effects where they can be compared: NaN in runs whose |TE| does not exceed the noise floor."""
    indirect, total = indirect_effect(effects), total_effect(effects)
    kept = abs(total) > noise_floor(effects)
    return indirect.where(kept), total.where(kept)


def noise_floor(effects: xarray.Dataset) -> xarray.DataArray:
    """By how much batching alone moves the metric: the largest difference from the sham row; a scalar, or by metric.

    The sham row equals the corrupted run or, where sites are knocked out of clean runs, the clean run.
    """
    difference = abs(effects.sham - (effects.clean if is_knock_out(effects) else effects.corrupted))
    return difference.max([dim for dim in difference.dims if dim != "metric"])


def is_knock_out(effects: xarray.Dataset) -> bool:
    """Whether `restored` holds clean runs with a site knocked out, as the attribute `intervention` says."""
    return effects.attrs.get("intervention", "restore") == "knock_out"


def summarize(
    effects: xarray.Dataset,
    by: str = "site",
    *,
    normalize: bool = False,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    method: str = "percentile",
    seed: int = 0,
) -> xarray.Dataset:
    """Mean indirect effects with bootstrap intervals over cases (Efron and Tibshirani 1993).

    Draws, and with `by` other than "site" the sites that share a label, are averaged within a case; the cases are
    resampled, never the draws. Normalized effects are ratios of means, resampled as such. Places at which the metric of
    some row is not finite are NaN, and no part of a group's mean; a warning names the rows.

    Args:
        effects: from `mediation.trace`.
        by: "site", or a coordinate of the sites to group them by: component, network, block, layer. Networks are kept
            apart, with labels such as "unet cross_attention" where there are several.
        normalize: reports IE / TE, as `indirect_effect` does.
        confidence: level of the interval.
        n_resamples: bootstrap resamples.
        method: "percentile" or "BCa".
        seed: of the resampling.

    Returns:
        A Dataset over `by` [and token, window, metric]: mean, low, high, n (cases that count), and noise_floor; total,
        total_low and total_high say the same of the total effect. With a single case, low and high are NaN. The
        attribute `intervention` says which indirect effect this is: restore (sufficiency) or knock_out (necessity).

    Raises:
        ValueError: if an argument is not one of the above.

    Example:
        >>> summarize(_example())["mean"].values.tolist()
        [1.0, 0.0]
    """
    if by not in ("site", "component", "network", "block", "layer"):
        raise ValueError(f"by must be site, component, network, block or layer, got {by!r}")
    check(effects, needs=() if by == "site" else (by,))
    check_interval(confidence, method)
    effects = without_bad_rows(effects)
    indirect, total = masked_effects(effects) if normalize else (indirect_effect(effects), total_effect(effects))
    indirect, total = indirect.mean("draw"), total.mean("draw")
    if by != "site":
        indirect = _grouped(indirect, by)
    options = {"confidence": confidence, "n_resamples": n_resamples, "method": method, "seed": seed}
    mean, low, high = mean_interval(indirect, total if normalize else None, **options)
    n = (~numpy.isnan(indirect)).sum("case")
    summary = xarray.Dataset({"mean": mean, "low": low, "high": high, "n": n, "noise_floor": noise_floor(effects)})
    for name, value in zip(("total", "total_low", "total_high"), mean_interval(total, None, **options), strict=True):
        summary[name] = value
    what = "indirect effect / total effect" if normalize else "indirect effect"
    mode = "knock_out" if is_knock_out(effects) else "restore"
    return summary.assign_attrs(options | {"quantity": what, "intervention": mode, "metric": measured_by(effects)})


def measured_by(effects: xarray.Dataset) -> str:
    """The metric that a map is of: the one that was chosen among several, or the names of all."""
    if "metric" in effects.coords and not effects.metric.ndim:
        return str(effects.metric.item())
    return effects.attrs.get("metric", "")


def _grouped(indirect: xarray.DataArray, by: str) -> xarray.DataArray:
    """Means over the sites that share a label and a network."""
    if by == "network" or "network" not in indirect.coords or len(numpy.unique(indirect.network)) == 1:
        return indirect.groupby(by).mean("site")
    kinds = list(zip(indirect.network.values.tolist(), indirect[by].values.tolist(), strict=True))
    names = {kind: "{} {}".format(*kind) for kind in sorted(set(kinds))}
    indirect = indirect.assign_coords({by: ("site", [names[kind] for kind in kinds])})
    return indirect.groupby(by).mean("site").sel({by: list(names.values())})


def top_sites(effects: xarray.Dataset, k: int = 5) -> list[str]:
    """Names of the k sites with the largest mean indirect effect, largest first; over tokens or windows, at their best.

    Places at which some row is not finite are left out, with a warning.

    Raises:
        ValueError: if k is not positive, or `effects` has several metrics.

    Example:
        >>> top_sites(_example(), k=1)
        ['unet.mid.0.resnet']
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check(effects, one_metric=True)
    mean = indirect_effect(without_bad_rows(effects)).mean(("case", "draw"))
    best = mean.max([dim for dim in mean.dims if dim != "site"])
    order = numpy.argsort(-best.values, kind="stable")
    return [str(best.site.values[i]) for i in order[:k] if not numpy.isnan(best.values[i])]


def _example() -> xarray.Dataset:
    """The smallest map, for the examples of this file: one case, one draw, two sites."""
    return xarray.Dataset(
        {
            "clean": (("case", "draw"), [[3.0]]),
            "corrupted": (("case", "draw"), [[1.0]]),
            "sham": (("case", "draw", "site"), [[[1.0, 1.0]]]),
            "restored": (("case", "draw", "site"), [[[2.0, 1.0]]]),
        },
        coords={"site": ["unet.mid.0.resnet", "unet.mid.0.feed_forward"]},
    )
