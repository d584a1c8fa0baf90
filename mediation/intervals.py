"""Bootstrap intervals over cases (Efron and Tibshirani 1993)."""

import warnings

import numpy
import xarray
from scipy import stats

_BATCH = 2**22  # numbers that resamples may take at a time: a few ten MB


def check_interval(confidence: float, method: str) -> None:
    """Checks the options that all intervals share.

    Raises:
        ValueError: if one is out of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if method not in ("percentile", "BCa"):
        raise ValueError(f'method must be "percentile" or "BCa", got {method!r}')


def mean_interval(
    values: xarray.DataArray,
    total: xarray.DataArray | None = None,
    *,
    confidence: float,
    n_resamples: int,
    method: str,
    seed: int,
) -> tuple[xarray.DataArray, xarray.DataArray, xarray.DataArray]:
    """Mean over cases (or, with `total`, the ratio of means) and its bootstrap interval, as three DataArrays.

    Cases that are NaN do not count. With a single case, the interval is NaN.
    """
    values = values.transpose("case", ...)
    arrays = [values.values]
    if total is not None:
        paired = xarray.broadcast(values, total)[1].transpose(*values.dims)
        arrays.append(paired.where(~numpy.isnan(values)).values)

    def statistic(*samples, axis=0):
        means = [nanmean(sample, axis) for sample in samples]
        return means[0] if len(means) == 1 else means[0] / means[1]

    point = statistic(*arrays)
    low = high = numpy.full_like(point, numpy.nan)
    if values.sizes["case"] > 1:
        with warnings.catch_warnings(), numpy.errstate(invalid="ignore"):
            # BCa of a constant column is undefined; its interval is NaN, which says so.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                arrays,
                statistic,
                paired=True,
                vectorized=True,
                axis=0,
                confidence_level=confidence,
                n_resamples=n_resamples,
                method=method,
                batch=max(1, _BATCH // values.size),
                rng=numpy.random.default_rng(seed),
            )
        low, high = found.confidence_interval
    template = values.isel(case=0, drop=True)
    return tuple(template.copy(data=data) for data in (point, low, high))


def nanmean(sample: numpy.ndarray, axis: int) -> numpy.ndarray:
    """`numpy.nanmean` that is NaN without a warning where nothing counts."""
    n = (~numpy.isnan(sample)).sum(axis)
    return numpy.divide(numpy.nansum(sample, axis), n, out=numpy.full(n.shape, numpy.nan), where=n > 0)
