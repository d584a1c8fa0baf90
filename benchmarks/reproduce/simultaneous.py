"""Bootstrap intervals that hold for many places together, of ratios of means.

Percentile intervals are too narrow with few cases, the more so the more places they have to hold for. Studentised ones,
whose width is the quantile of the largest deviation over all places, keep their level (Efron and Tibshirani 1993,
section 12.5; Romano and Wolf 2005, doi:10.1198/016214504000000539).
"""

import functools

import numpy

N_RESAMPLES = 10_000


def ratio_intervals(
    values: numpy.ndarray, total: numpy.ndarray, confidence: float, *, least_error: float = 0.0
) -> numpy.ndarray:
    """Ratios of means over cases with intervals that all hold together.

    For the ratio r of the means of x and t, the standard error is that of the mean of (x − r t) / mean(t). With
    T = (r* − r) / se* of a resample, all intervals are r ± c se, where c is the quantile of the maximum of |T|.

    Args:
        values: x, (case, place); NaN where a case does not have the place.
        total: t, (case,); NaN where a case does not count. Ones, for means of x.
        confidence: that all intervals cover.
        least_error: below which no standard error counts as known. Of rare events, many resamples have none, and their
            standard error of 0 would make every interval infinite.

    Returns:
        Ratio, low and high, (3, place). Intervals are NaN where fewer than two cases have the place, and infinite where
        the cases are too few to tell.

    Example:
        >>> import numpy
        >>> ratio_intervals(numpy.array([[1.0], [1.0], [1.0]]), numpy.full(3, 2.0), 0.95).ravel().tolist()
        [0.5, 0.5, 0.5]
    """
    measured = ~numpy.isnan(values) & ~numpy.isnan(total)[:, None]
    x = numpy.where(measured, values, 0)
    t = numpy.where(measured, total[:, None], 0)
    ratio, error = (one[0] for one in _ratios(numpy.ones((1, len(values))), x, t, measured))
    resampled, errors = _ratios(_draws(len(values)), x, t, measured)
    error, errors = (numpy.where(one < least_error, least_error, one) for one in (error, errors))
    enough = measured.sum(0) > 1
    with numpy.errstate(divide="ignore", invalid="ignore"):
        # 0 / 0: a resample of equal cases deviates by nothing, or has none of the cases with this place
        deviations = numpy.nan_to_num(abs(resampled - ratio) / errors, nan=0.0, posinf=numpy.inf)
    deviations[:, (error == 0) | ~enough] = 0
    # a quantile that is one of the values, since interpolating between infinite ones is not defined
    reach = numpy.quantile(deviations.max(1), confidence, method="inverted_cdf")
    half = numpy.where(error > 0, reach * numpy.where(error > 0, error, 1), 0)
    half = numpy.where(enough, half, numpy.nan)
    return numpy.array([ratio, ratio - half, ratio + half])


@functools.lru_cache(maxsize=2)
def _draws(n_cases: int) -> numpy.ndarray:
    """How often each resample has each case, (resample, case): the same for all values of as many cases.

    Counts are floats, since numpy multiplies matrices of integers without BLAS.
    """
    rng = numpy.random.default_rng(0)
    draws = rng.multinomial(n_cases, numpy.full(n_cases, 1 / n_cases), size=N_RESAMPLES).astype(float)
    draws.flags.writeable = False
    return draws


def _ratios(
    draws: numpy.ndarray, x: numpy.ndarray, t: numpy.ndarray, measured: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ratios and standard errors, (resample, place), where each case counts as often as it was drawn."""
    n, whole, squared = draws @ measured.astype(float), draws @ t, draws @ x**2
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratio = (draws @ x) / whole
        squares = squared - 2 * ratio * (draws @ (x * t)) + ratio**2 * (draws @ t**2)
        # what cancels to less than its rounding is 0
        squares = numpy.where(squares > 1e-13 * squared, squares, 0)
        error = numpy.sqrt(squares / (n - 1) / n) / abs(whole / n)
    return ratio, error
