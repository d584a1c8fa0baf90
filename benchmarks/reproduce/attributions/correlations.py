"""How well predicted changes of J agree with true ones."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy
import xarray
from scipy import stats

from benchmarks.reproduce.attributions.predictions import MAIN
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim, Estimate, Finding, together

PAPER_R = 0.51
_N_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How what was predicted agrees with what happened, of one question.

    Attributes:
        question: its name.
        ablations: of which kind, with the share of weights for random ones.
        n: ablations.
        pearson, spearman: correlation of predicted and true changes of J.
        control: Pearson's, of true changes with what scores of other weights of the same matrices predict; of single
            layers, whose scores predict the same in any order, with the sum of squared weights.
        slope: of true by predicted changes, by least squares.
    """

    question: str
    ablations: str
    n: int
    pearson: Estimate
    spearman: Estimate
    control: Estimate
    slope: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best weights by some scores, set to 0 at once.

    Attributes:
        question: its name.
        label: scores and ratio.
        n_weights: how many there are.
        predicted, actual: changes as parts of J's absolute value.
    """

    question: str
    label: str
    n_weights: int
    predicted: float
    actual: float


def summarize(report: xarray.Dataset) -> list[Prediction]:
    """Agreement within each kind of ablation that there are many of.

    Args:
        report: from `predictions.Question.run`.
    """
    is_random, is_layer = (report.kind.values == kind for kind in ("random", "layer"))
    shares = dict.fromkeys(report.label.values[is_random].tolist())
    groups = {
        f"{share} of the weights at random": (is_random & (report.label.values == share), "shuffled")
        for share in shares
    }
    groups["single layers"] = (is_layer, "squares")
    found = []
    for ablations, (chosen, other) in groups.items():
        rows = report.isel(ablation=numpy.flatnonzero(chosen))
        predicted, control, actual = (rows[name].values for name in ("predicted", other, "actual"))
        found.append(
            Prediction(
                report.attrs["name"],
                ablations,
                len(actual),
                correlate(_pearson, predicted, actual),
                correlate(_spearman, predicted, actual),
                correlate(_pearson, control, actual),
                float(stats.linregress(predicted, actual).slope),
            )
        )
    return found


def choices(report: xarray.Dataset) -> list[Choice]:
    """What setting the best weights to 0 comes to, by every score.

    Args:
        report: as of `summarize`.
    """
    rows = report.isel(ablation=numpy.flatnonzero(report.kind.values == "top"))
    whole = abs(float(report.attrs["value"]))
    columns = (rows[name].values.tolist() for name in ("label", "n_weights", "predicted", "actual"))
    return [
        Choice(report.attrs["name"], label, n, predicted / whole, actual / whole)
        for label, n, predicted, actual in zip(*columns, strict=True)
    ]


def correlate(
    statistic: Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray], x: numpy.ndarray, y: numpy.ndarray
) -> Estimate:
    """A correlation with its percentile interval over resampled ablations.

    Args:
        statistic: of the last axis.
        x: values, (ablation,).
        y: others, likewise.
    """
    found = stats.bootstrap(
        (x, y),
        lambda x, y, axis: statistic(x, y),
        paired=True,
        vectorized=True,
        n_resamples=_N_RESAMPLES,
        method="percentile",
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return Estimate(float(statistic(x, y)), float(found.low), float(found.high))


def predicts(found: Mapping[str, list[Prediction]]) -> Claim:
    """That scores predict the effect of random ablations at least as well as the paper says.

    Args:
        found: question -> its rows.
    """
    findings = []
    for question, rows in found.items():
        (one,) = (row for row in rows if row.ablations.startswith(f"{MAIN:g} of"))
        verdict, reason = judge(one.pearson, one.control)
        place = f"{one.n:,} ablations of {one.ablations}"
        findings.append(Finding(question, place, one.pearson, one.control, None, verdict, reason))
    return Claim(
        name="scores_predict_ablations",
        statement=f"Scores predict what ablating random weights does, with r of at least {PAPER_R}.",
        quantity="Pearson's r of predicted and true change of J",
        control="the same with scores of other weights of the same matrices",
        rule=f"the interval lies above the control's, and from {PAPER_R} up; not reproduced if it lies below {PAPER_R}",
        findings=tuple(findings),
        verdict=together([one.verdict for one in findings]),
    )


def judge(found: Estimate, control: Estimate) -> tuple[str, str]:
    """The verdict on a correlation, and why.

    Example:
        >>> judge(Estimate(0.7, 0.6, 0.8), Estimate(0.0, -0.1, 0.1))[0]
        'reproduced'
    """
    if found.high < PAPER_R:
        return NOT_REPRODUCED, "r is below the paper's"
    if not found.low > control.high:
        return INCONCLUSIVE, "scores of other weights may do as well"
    return (REPRODUCED, "r is the paper's or more") if found.low >= PAPER_R else (INCONCLUSIVE, "r may be either")


def _pearson(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    """Over the last axis, of all resamples at once, as `scipy.stats.pearsonr` does it for one."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (x, y))
    x, y = (values / numpy.linalg.norm(values, axis=-1, keepdims=True) for values in (x, y))
    return numpy.clip((x * y).sum(-1), -1, 1)


def _spearman(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    return _pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))
