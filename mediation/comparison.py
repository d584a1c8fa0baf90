"""Comparison: of two maps by their ranks, and of the sites of one map by paired tests."""

import functools
import warnings
from collections.abc import Mapping

import numpy
import xarray
from scipy import stats

from mediation.badrows import without_bad_rows
from mediation.effects import indirect_effect
from mediation.intervals import check_interval, mean_interval, nanmean
from mediation.schema import check

_STATISTICS = ("spearman", "kendall", "overlap")
_IDENTITY = ("prompt", "subject", "seed")  # coordinates that tell one case from another


def compare(
    a: xarray.Dataset,
    b: xarray.Dataset,
    k: int = 5,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    method: str = "percentile",
    seed: int = 0,
) -> xarray.Dataset:
    """Tells how far two maps rank the same places alike, with bootstrap intervals over cases.

    Places are the sites, with their tokens or windows, that both maps have and measured, all rows of them finite; only
    their ranks by mean indirect effect count, so maps on different metrics can be compared. Maps of the same cases
    (prompt, subject and seed) are resampled together, others independently. Resampling adds noise to both rankings, so
    percentile intervals tend to lie low; `method="BCa"` corrects for it.

    Args:
        a: a map of one metric, from `mediation.trace`.
        b: another one, of the same dims.
        k: how many of the largest effects the overlap looks at.
        confidence: level of the intervals.
        n_resamples: bootstrap resamples.
        method: "percentile" or "BCa".
        seed: of the resampling.

    Returns:
        A Dataset over `statistic`: estimate, low, high, and chance, what unrelated maps are expected to have. spearman
        and kendall (tau-b) are rank correlations, overlap the share of the k largest effects of one map that are among
        those of the other. A correlation with a constant map is NaN, and so are intervals if a map has a single case.
        Attributes say how many places and cases there were, and whether cases were paired.

    Raises:
        ValueError: if the maps have different dims, or fewer than max(2, k) places in common.

    Example:
        >>> from mediation.effects import _example
        >>> compare(_example(), _example(), k=1).estimate.round(6).values.tolist()
        [1.0, 1.0, 1.0]
    """
    check_interval(confidence, method)
    for effects in (a, b):
        check(effects, one_metric=True)
    if set(a.restored.dims) != set(b.restored.dims):
        raise ValueError(f"the maps have different dims: {a.restored.dims} and {b.restored.dims}")
    order = _same_cases(a, b)
    if order is not None:
        b = b.isel(case=order)
    a, b = without_bad_rows(a), without_bad_rows(b)
    values = _by_place(a, b)
    n_places = values[0].shape[1]
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if n_places < max(2, k):
        raise ValueError(f"k={k} needs at least {max(2, k)} places that both maps measured; they share {n_places}")

    def statistic(*rows):
        # the resampled cases of each map; given once, they are those of both
        return _rank_agreement(*(nanmean(x[i], 0) for x, i in zip(values, rows * 2, strict=False)), k)

    samples = [numpy.arange(len(x)) for x in (values if order is None else values[:1])]
    low = high = numpy.full(len(_STATISTICS), numpy.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        estimate = statistic(*samples)
        if min(map(len, samples)) > 1:
            found = stats.bootstrap(
                samples,
                statistic,
                vectorized=False,
                confidence_level=confidence,
                n_resamples=n_resamples,
                method=method,
                rng=numpy.random.default_rng(seed),
            )
            low, high = found.confidence_interval
    columns = {"estimate": estimate, "low": low, "high": high, "chance": [0.0, 0.0, k / n_places]}
    return xarray.Dataset(
        {name: ("statistic", column) for name, column in columns.items()},
        coords={"statistic": list(_STATISTICS)},
        attrs={
            "k": k,
            "n_places": n_places,
            "n_cases": [len(x) for x in values],
            "paired": int(order is not None),
            "confidence": confidence,
            "n_resamples": n_resamples,
            "method": method,
            "seed": seed,
        },
    )


def contrast(
    effects: xarray.Dataset,
    reference: str | Mapping[str, object],
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    method: str = "percentile",
    seed: int = 0,
) -> xarray.Dataset:
    """Tests every place of a map against one: the paired differences of their indirect effects, Holm-corrected.

    The difference is IE(place) − IE(reference), averaged over the draws of a case. Its mean over cases is tested by
    flipping their signs, two-sided (`scipy.stats.permutation_test`), exactly if there are at most `n_resamples` ways to
    flip them. No p-value can be below 2 / 2^cases: eight cases are needed to reach 0.01. Holm's correction (Holm 1979,
    jstor.org/stable/4615733) covers all places tested; to compare two sites only, pass a map of these two.

    Args:
        effects: a map of one metric, from `mediation.trace`.
        reference: a site, compared with the others at each token or window, or one place for all, as
            `{"site": "text_encoder.0.self_attention", "token": "last_subject"}`.
        confidence: level of the bootstrap intervals of the differences; they are not corrected.
        n_resamples: sign flips, and bootstrap resamples.
        method: of the intervals, "percentile" or "BCa".
        seed: of both.

    Returns:
        A Dataset over site [and token or window]: difference, low, high, p, p_holm and n (cases that count); NaN at the
        reference and at what never ran.

    Raises:
        KeyError: if the reference is not in the map.

    Example:
        >>> from mediation.effects import _example
        >>> contrast(_example(), "unet.mid.0.feed_forward").difference.to_series().to_dict()
        {'unet.mid.0.resnet': 1.0}
    """
    check(effects, one_metric=True)
    check_interval(confidence, method)
    place = {"site": reference} if isinstance(reference, str) else dict(reference)
    indirect = indirect_effect(without_bad_rows(effects)).mean("draw").transpose("case", ...)
    for dim, label in place.items():
        if dim not in indirect.dims or dim == "case" or label not in indirect[dim].values.tolist():
            raise KeyError(f"the map has no {dim} {label!r} to compare with")
    is_reference = functools.reduce(lambda x, y: x & y, (indirect[dim] == label for dim, label in place.items()))
    differences = (indirect - indirect.sel(place, drop=True)).where(~is_reference, drop=True)
    if not differences.size:
        raise ValueError("the map has nothing but the reference")
    options = {"confidence": confidence, "n_resamples": n_resamples, "method": method, "seed": seed}
    mean, low, high = mean_interval(differences, **options)
    n = (~numpy.isnan(differences)).sum("case")
    p = mean.copy(data=_sign_flip(differences.values, n_resamples, seed)).where(n > 0)
    result = {"difference": mean, "low": low, "high": high, "p": p, "p_holm": p.copy(data=_holm(p.values)), "n": n}
    return xarray.Dataset(result).assign_attrs(
        options | {"reference": str(reference), "test": "paired sign flip, two-sided", "n_tests": int((n > 0).sum())}
    )


def _same_cases(a: xarray.Dataset, b: xarray.Dataset) -> list[int] | None:
    """Where each case of `a` is in `b`; None if the cases are not the same, or not told apart."""
    if not all(name in effects.coords for name in _IDENTITY for effects in (a, b)):
        return None
    cases_a, cases_b = (list(zip(*(x[name].values.tolist() for name in _IDENTITY), strict=True)) for x in (a, b))
    if len(set(cases_a)) < len(cases_a) or sorted(cases_a) != sorted(cases_b):
        return None
    return [cases_b.index(case) for case in cases_a]


def _by_place(a: xarray.Dataset, b: xarray.Dataset) -> list[numpy.ndarray]:
    """Indirect effects (case, place) of both maps, at the places that both measured."""
    maps = [indirect_effect(effects).mean("draw").transpose("case", "site", ...) for effects in (a, b)]
    dims = maps[0].dims[1:]
    labels = [{dim: x[dim].values.tolist() for dim in dims} for x in maps]
    common = {dim: [label for label in labels[0][dim] if label in labels[1][dim]] for dim in dims}
    values = [x.sel(common).transpose("case", *dims).values.reshape(x.sizes["case"], -1) for x in maps]
    measured = numpy.all([~numpy.isnan(x).all(0) for x in values], axis=0)
    return [x[:, measured] for x in values]


def _rank_agreement(x: numpy.ndarray, y: numpy.ndarray, k: int) -> numpy.ndarray:
    """Spearman's rho, Kendall's tau-b and the overlap of the k largest, over the places that resampling left both."""
    x, y = (values[~numpy.isnan(x + y)] for values in (x, y))
    largest = [set(numpy.argsort(-values, kind="stable")[:k].tolist()) for values in (x, y)]
    overlap = len(largest[0] & largest[1]) / k
    return numpy.array([stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic, overlap])


def _sign_flip(differences: numpy.ndarray, n_resamples: int, seed: int) -> numpy.ndarray:
    """Two-sided p-values of the mean over the first axis being 0."""
    if len(differences) < 2:
        return numpy.ones(differences.shape[1:])  # scipy wants two; either sign is as extreme as the other
    return stats.permutation_test(
        (differences,),
        nanmean,
        permutation_type="samples",
        vectorized=True,
        axis=0,
        n_resamples=n_resamples,
        batch=max(1, 2**22 // differences.size),  # a few ten MB at a time
        rng=numpy.random.default_rng(seed),
    ).pvalue


def _holm(p: numpy.ndarray) -> numpy.ndarray:
    """Step-down adjusted p-values; NaN is no test.

    Example:
        >>> _holm(numpy.array([0.03, 0.01, numpy.nan, 0.04])).tolist()
        [0.06, 0.03, nan, 0.06]
    """
    flat = p.ravel()
    order = numpy.argsort(flat)[: int((~numpy.isnan(flat)).sum())]  # NaN is sorted last
    adjusted = numpy.full(flat.shape, numpy.nan)
    adjusted[order] = numpy.minimum(1, numpy.maximum.accumulate(flat[order] * numpy.arange(len(order), 0, -1)))
    return adjusted.reshape(p.shape)
