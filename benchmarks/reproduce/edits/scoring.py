"""What the edits of some units come to: shares with intervals, and which recipe did best."""

from collections.abc import Mapping, Sequence

import numpy
import torch
import xarray

import editing
from benchmarks.emoji.judging import interval
from editing.evaluation import UNEDITED
from editing.scores import harmonic_mean

GONE, KEPT = 0.95, 0.02  # the aim: this share of pictures without the source, at this cost in specificity


def pooled(reports: Sequence[xarray.Dataset]) -> xarray.Dataset:
    """Reports on the same models, as one over all their trials."""
    options = {"data_vars": "minimal", "coords": "minimal", "compat": "override", "join": "exact"}
    return xarray.concat(reports, "trial", combine_attrs="override", **options)


def score(report: xarray.Dataset) -> list[dict]:
    """For each model, the shares that tables show, as `mean`, `low`, `high` and `n`.

    - gone: efficacy and generality pictures that do not show the source;
    - efficacy, generality: the same, by role;
    - gone_where_shown: the same, of those that show it before the edit;
    - target: efficacy and generality pictures that show the target;
    - specificity, quality: pictures that show what their prompt says; *_change: against the unedited model, paired;
    - h0: MACE's harmonic mean.
    """
    summary = editing.summarize_evaluation(report)
    changed = report.sel(trial=numpy.isin(report.role.values, ["efficacy", "generality"]))
    shown_before = changed.is_source.sel(model=UNEDITED).values.ravel() == 1
    found = []
    for model in report.model.values.tolist():
        source, target = (changed[name].sel(model=model).values.ravel() for name in ("is_source", "is_target"))
        row: dict = {"model": model, "gone": _share(source == 0), "gone_where_shown": _share(source[shown_before] == 0)}
        for role in ("efficacy", "generality"):
            values = changed.is_source.sel(model=model, trial=changed.role.values == role).values
            row[role] = _share(values.ravel() == 0)
        row["target"] = _share(target[~numpy.isnan(target)] == 1)
        for role in ("specificity", "quality"):
            if role in summary.role:
                cell = summary.sel(measure="is_source", role=role, model=model)
                row[role] = _cells(cell, "mean", "low", "high") | {"n": int(cell.n)}
                row[f"{role}_change"] = _cells(cell, "change", "change_low", "change_high")
        row["h0"] = _cells(summary.sel(model=model), "h0", "h0_low", "h0_high")
        found.append(row)
    return found


def ranked(report: xarray.Dataset) -> list[str]:
    """The edits of a report, best first: by `merit`, and by the share of targets among equals."""
    changed = numpy.isin(report.role.values, ["efficacy", "generality"])
    source, target = (report[name].sel(trial=changed).mean(("trial", "seed")) for name in ("is_source", "is_target"))
    kept = report.is_source.sel(trial=report.role.values == "specificity").mean(("trial", "seed"))
    keys = {
        name: (
            merit(1 - source.sel(model=name), kept.sel(model=name), kept.sel(model=UNEDITED)),
            target.sel(model=name),
        )
        for name in report.model.values.tolist()
        if name != UNEDITED
    }
    return sorted(keys, key=lambda name: tuple(map(float, keys[name])), reverse=True)


def merit(gone: float, kept: float, kept_unedited: float) -> float:
    """H0, with one share for all pictures that should change, and specificity relative to the unedited model's.

    Args:
        gone: share of efficacy and generality pictures without the source.
        kept: specificity of the edit; more than the unedited model's is worth no more than as much.
        kept_unedited: specificity of the unedited model.

    Example:
        >>> merit(1.0, 0.4, 0.4), merit(0.5, 0.4, 0.4)
        (1.0, 0.6)
    """
    relative = min(1.0, float(kept) / float(kept_unedited)) if kept_unedited else 0.0
    return float(harmonic_mean(1 - float(gone), relative, 1 - float(gone)))


def verdict(row: Mapping) -> str:
    """Whether an edit reaches the aim: 95% of targets without the source, specificity within 2 points.

    Example:
        >>> share = {"mean": 0.99, "low": 0.97, "high": 1.0}
        >>> verdict({"gone": share, "specificity_change": {"mean": -0.01, "low": -0.03, "high": 0.01}})
        'met by the estimates, open by their intervals'
    """
    gone, change = row["gone"], row["specificity_change"]
    if gone["mean"] < GONE or change["mean"] < -KEPT:
        return "not met"
    if gone["low"] >= GONE and change["low"] >= -KEPT:
        return "met"
    return "met by the estimates, open by their intervals"


def _share(values: numpy.ndarray) -> dict | None:
    """A proportion with Wilson's interval, or None of nothing."""
    if not len(values):
        return None
    found = interval(torch.from_numpy(values))
    return {"mean": found["accuracy"], "low": found["low"], "high": found["high"], "n": found["n"]}


def _cells(summary: xarray.Dataset, mean: str, low: str, high: str) -> dict[str, float]:
    return {key: float(summary[name]) for key, name in (("mean", mean), ("low", low), ("high", high))}
