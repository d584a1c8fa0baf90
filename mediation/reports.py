"""What the command line tells of a map: tables for people, records for machines, figures."""

import json

import matplotlib.axes
import pandas
import xarray

from mediation.effects import summarize
from mediation.plots import plot_bars, plot_effects, plot_images
from mediation.verification import verification


def describe(effects: xarray.Dataset, n_rows: int = 10) -> str:
    """The total effect, and the places with the largest indirect effects; by metric, if there are several."""
    if "metric" in effects.dims:
        return "\n\n".join(describe(effects.sel(metric=name), n_rows) for name in effects.metric.values)
    summary = summarize(effects)
    places = _places(summary).sort_values("mean", ascending=False, kind="stable").head(n_rows)
    labels = [name for name in ("site", "token", "latent", "window") if name in places]
    checked = f"\nestimates against exact values:\n{_table(_checked(effects))}" if "sampled" in effects else ""
    return (
        f"{', '.join(_count(n, dim) for dim, n in effects.restored.sizes.items())}\n"
        f"total effect {float(summary.total):.3g} [{float(summary.total_low):.3g}, {float(summary.total_high):.3g}]"
        f" on {summary.attrs['metric'] or 'the metric'}, noise floor {float(summary.noise_floor):.1g}\n"
        f"largest indirect effects (95% intervals over cases):\n{_table(places[[*labels, 'mean', 'low', 'high', 'n']])}"
        f"{checked}"
    )


def as_json(effects: xarray.Dataset) -> str:
    """The summary of a map: one record per place, and the total effect; a list of these, if it has several metrics."""
    if "metric" in effects.dims:
        records = [json.loads(as_json(effects.sel(metric=name))) for name in effects.metric.values]
        return json.dumps({"metrics": records}, ensure_ascii=False)
    summary = summarize(effects)
    names = ("total", "total_low", "total_high", "noise_floor")
    (whole,) = _plain(pandas.DataFrame([{name: float(summary[name]) for name in names}]))
    record = {"metric": summary.attrs["metric"] or None, "intervention": summary.attrs["intervention"], **whole}
    if "sampled" in effects:
        record["verification"] = _plain(_checked(effects))
    return json.dumps(record | {"places": _plain(_places(summary))}, ensure_ascii=False)


def describe_scores(effects: xarray.Dataset, n_rows: int = 10) -> str:
    """The sites whose weights have the largest scores of either sign, of a map by `Attribution.to_dataset`."""
    scores = _scores(effects)
    largest = scores.reindex((scores.positive - scores.negative).sort_values(ascending=False, kind="stable").index)
    return f"{effects.attrs['metric']} is {effects.clean.item():.4g}; sums by site:\n{_table(largest.head(n_rows))}"


def scores_as_json(effects: xarray.Dataset) -> str:
    """The sums of scores by site as records, and the objective."""
    record = {"objective": effects.attrs["metric"], "value": effects.clean.item()}
    return json.dumps(record | {"places": _plain(_scores(effects))}, ensure_ascii=False)


def describe_comparison(comparison: xarray.Dataset) -> str:
    """The statistics of `compare`, and what they were computed from."""
    n_a, n_b = comparison.attrs["n_cases"]
    cases = f"the same {_count(n_a, 'case')}" if comparison.attrs["paired"] else f"{n_a} and {n_b} cases"
    places = _count(comparison.attrs["n_places"], "place")
    return f"{places}, {cases}\n{_table(comparison.to_dataframe().reset_index())}"


def comparison_as_json(comparison: xarray.Dataset) -> str:
    """The statistics of `compare` as records, and its attributes."""
    return json.dumps(comparison.attrs | {"statistics": _plain(comparison.to_dataframe().reset_index())})


def draw(effects: xarray.Dataset, kind: str, *, by: str | None = None, normalize: bool = False) -> matplotlib.axes.Axes:
    """Draws a map as a "map", "bars" or "images"."""
    if by is not None and kind != "bars":
        raise ValueError(f"only bars are grouped by a coordinate, not {kind}")
    if normalize and kind == "images":
        raise ValueError("images show no effect that could be normalized")
    if kind == "map":
        return plot_effects(effects, normalize=normalize)
    if kind == "bars":
        return plot_bars(effects, by or "component", normalize=normalize)
    if kind == "images":
        return plot_images(effects)
    raise ValueError(f"a map is drawn as map, bars or images, got {kind!r}")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _checked(effects: xarray.Dataset) -> pandas.DataFrame:
    n_measured = int(effects.exact.notnull().any(("case", "draw")).sum())
    return verification(effects, k=min(5, n_measured)).to_dataframe().reset_index()


def _places(summary: xarray.Dataset) -> pandas.DataFrame:
    return summary[["mean", "low", "high", "n"]].to_dataframe().reset_index()


def _scores(effects: xarray.Dataset) -> pandas.DataFrame:
    frame = effects[["positive", "negative", "n_weights"]].to_dataframe().reset_index()
    return frame[["site", "positive", "negative", "n_weights"]]


def _table(frame: pandas.DataFrame) -> str:
    return frame.to_string(index=False, float_format="{:.3g}".format)


def _plain(frame: pandas.DataFrame) -> list[dict]:
    """Records without NaN, which JSON does not have."""
    return json.loads(frame.to_json(orient="records", double_precision=15))
