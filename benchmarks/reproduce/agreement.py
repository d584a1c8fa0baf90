"""Whether maps of different attributes differ by more than maps of one attribute's halves do.

Two noisy maps of the same pattern never agree perfectly. Cases of each attribute are therefore split in halves, and
rank correlations ρ between the maps of halves are compared: across attributes, and as far as reliability allows,

    gap = sqrt(ρ(a₁, a₂) ρ(b₁, b₂)) − mean of ρ(aᵢ, bⱼ),

which is about 0 if a and b have one pattern, whatever their strengths and noise (Spearman 1904, doi:10.2307/1412159, on
attenuation). Intervals are percentiles over resampled cases; resampling adds noise to every ρ, so they lie low.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy
import xarray
from scipy import stats

from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim, Estimate, Finding, by_place
from mediation import indirect_effect
from mediation.badrows import without_bad_rows
from mediation.intervals import nanmean

# a gap that is smaller is no difference to speak of
SMALL = 0.1
N_RESAMPLES = 2000


Half = numpy.ndarray  # indirect effects (case, site)


def differs(maps: Mapping[str, xarray.Dataset]) -> Claim:
    """That knowledge is in different places of the denoiser for different attributes.

    Args:
        maps: by attribute, maps of one metric over the same sites.

    Returns:
        A claim whose findings, one per attribute and one for all, have the correlation with other attributes as their
        estimate and the reliability as their control; the verdict is that of "all".
    """
    halves = [half for effects in maps.values() for half in _halves(effects)]
    findings = []
    if len(maps) > 1 and all(map(len, halves)):
        found = numpy.concatenate([_statistics(halves, _all_of(halves)), _statistics(halves, _resampled(halves))])
        for i, attribute in enumerate([*maps, "all"]):
            across, within, gap = (_estimate(found[:, i, j]) for j in range(3))
            verdict, reason = judge_gap(within, gap)
            findings.append(Finding(attribute, "all sites", across, within, None, verdict, f"{reason}; gap {gap}"))
    return Claim(
        name="differs_by_attribute",
        statement="Which sites of the U-Net carry knowledge differs by attribute.",
        quantity="Spearman's ρ between maps of different attributes, from halves of their cases",
        control="reliability: ρ between halves of one attribute, geometric mean of both attributes",
        rule="the reliability's interval lies above 0, and so does the interval of the gap, reliability − ρ; not"
        f" reproduced if the gap's interval lies below {SMALL}",
        findings=tuple(findings),
        verdict=findings[-1].verdict if findings else INCONCLUSIVE,
    )


def judge_gap(within: Estimate, gap: Estimate) -> tuple[str, str]:
    """The verdict on attributes that differ, and why.

    Example:
        >>> judge_gap(Estimate(0.8, 0.7, 0.9), Estimate(0.5, 0.3, 0.6))[0]
        'reproduced'
    """
    if not within.low > 0:
        return INCONCLUSIVE, "halves of one attribute do not agree either"
    if gap.low > 0:
        return REPRODUCED, "attributes agree less with each other than with themselves"
    if gap.high < SMALL:
        return NOT_REPRODUCED, "attributes agree with each other as they do with themselves"
    return INCONCLUSIVE, "the gap may be nothing, or may not"


def _halves(effects: xarray.Dataset) -> tuple[Half, Half]:
    """Indirect effects (case, site) of every other case, and of those between."""
    values = by_place(indirect_effect(without_bad_rows(effects))).mean("draw").transpose("case", "place").values
    return values[::2], values[1::2]


def _all_of(halves: Sequence[Half]) -> list[numpy.ndarray]:
    """Every case once."""
    return [numpy.arange(len(half))[None] for half in halves]


def _resampled(halves: Sequence[Half]) -> list[numpy.ndarray]:
    """Cases of each half, (resample, case), drawn anew within it, so that no case is in both."""
    rng = numpy.random.default_rng(0)
    draws = [[rng.integers(len(half), size=len(half)) for half in halves] for _ in range(N_RESAMPLES)]
    return [numpy.array(own) for own in zip(*draws, strict=True)]


def _statistics(halves: Sequence[Half], cases: Sequence[numpy.ndarray]) -> numpy.ndarray:
    """ρ across, ρ within, and the gap: for each attribute with the others, and over all pairs.

    Args:
        halves: of all attributes, one pair after the other.
        cases: which of each half count, (resample, case).

    Returns:
        (resample, attribute and "all", statistic).
    """
    means = [numpy.array([nanmean(half[rows], 0) for rows in own]) for half, own in zip(halves, cases, strict=True)]
    ranks = stats.rankdata(numpy.stack(means, 1), axis=-1)
    rho = _correlations(ranks)
    n = len(halves) // 2
    across = rho.reshape(-1, n, 2, n, 2).mean((2, 4))
    own = numpy.clip(rho[:, range(0, 2 * n, 2), range(1, 2 * n, 2)], 0, None)
    within = numpy.sqrt(own[:, :, None] * own[:, None])
    pairs = {i: [(i, j) for j in range(n) if j != i] for i in range(n)} | {n: list(itertools.combinations(range(n), 2))}
    rows = []
    for chosen in pairs.values():
        i, j = zip(*chosen, strict=True)
        rows.append([one[:, i, j].mean(1) for one in (across, within, within - across)])
    return numpy.array(rows).transpose(2, 0, 1)


def _correlations(ranks: numpy.ndarray) -> numpy.ndarray:
    """`numpy.corrcoef` of each resample's ranks (resample, half, place): (resample, half, half)."""
    centred = ranks - ranks.mean(-1, keepdims=True)
    with numpy.errstate(invalid="ignore", divide="ignore"):  # a constant map has no ranks: NaN says so
        covariances = centred @ centred.swapaxes(1, 2) / (ranks.shape[-1] - 1)
        deviations = numpy.sqrt(numpy.diagonal(covariances, axis1=1, axis2=2))
        return numpy.clip(covariances / deviations[:, :, None] / deviations[:, None], -1, 1)


def _estimate(values: numpy.ndarray) -> Estimate:
    """The first value, with the percentile interval of the others."""
    low, high = numpy.quantile(values[1:], (0.025, 0.975))
    return Estimate(float(values[0]), float(low), float(high))
