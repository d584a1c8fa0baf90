"""Results as figures."""

import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.figure
import matplotlib.pyplot
import numpy
import xarray

import mediation
from benchmarks.reproduce.attributions.fidelity import Fidelity, points
from benchmarks.reproduce.attributions.predictions import MAIN
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.attributions.variants import Compared
from benchmarks.reproduce.attributions.whereabouts import Share, of_amount
from benchmarks.reproduce.claims import Estimate
from editing.ablation import CONTROLS
from editing.evaluation import UNEDITED

# Told apart by colour and by shape.
_VARIANTS = {
    "estimated": ("o", "#7b6aa6"),
    "integrated": ("s", "#d98a29"),
    "estimated, screened": ("^", "#3f8f8b"),
    "integrated, screened": ("D", "0.35"),
}
_STYLES = (("o", "#7b6aa6"), ("s", "0.5"), ("^", "#3f8f8b"), ("D", "#d98a29"))
_SCORES = dict(zip(("cad", *CONTROLS), _STYLES, strict=True))
_STATISTICS = {"spearman": "Spearman's ρ", "recall": "recall of the largest"}

# names, and figures that are drawn when it is their turn
Figures = Iterator[tuple[str, matplotlib.figure.Figure]]


def of_maps(fidelities: Sequence[Fidelity], compared: Sequence[Compared]) -> Figures:
    """For each kind of place and metric, both statistics by attribute, and estimates against exact effects."""
    for i, places in enumerate(dict.fromkeys(one.places for one in fidelities), start=1):
        maps = [one for one in compared if one.places == places]
        for metric in dict.fromkeys(one.metric for one in fidelities):
            chosen = [one for one in fidelities if (one.places, one.metric) == (places, metric)]
            yield f"maps_{i}_{metric}", draw_fidelities(chosen)
            yield f"effects_{i}_{metric}", draw_effects(maps, metric)


def of_predictions(reports: Sequence[xarray.Dataset]) -> Figures:
    """Random ablations and single layers, and the best weights."""
    yield "predictions", draw_predictions(reports)
    yield "best_weights", draw_choices(reports)


def of_ablations(rows: Mapping[str, Sequence[Mapping]]) -> Figures:
    """What the probe sees, by objective."""
    for objective, found in rows.items():
        yield f"ablations_{objective}", draw_ablations(objective, found)


def of_places(
    shares: Sequence[Share], sums: Mapping[str, xarray.Dataset], causal: Mapping[str, xarray.Dataset]
) -> Figures:
    """Kinds of sites, and single sites."""
    yield "components", draw_shares(shares)
    yield "layers", draw_layers(sums, causal)


def draw_fidelities(found: Sequence[Fidelity]) -> matplotlib.figure.Figure:
    """Rank correlation and recall by attribute and variant, with 95% intervals; lines are the goals."""
    attributes = list(dict.fromkeys(one.attribute for one in found))
    size = (0.9 * len(attributes) + 3, 5.2)
    figure, axes = matplotlib.pyplot.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    variants = [variant for variant in _VARIANTS if any(one.variant == variant for one in found)]
    for ax, (statistic, label) in zip(axes, _STATISTICS.items(), strict=True):
        for i, variant in enumerate(variants):
            rows = [one for one in found if one.variant == variant]
            x = numpy.array([attributes.index(one.attribute) for one in rows]) + 0.15 * (i - (len(variants) - 1) / 2)
            marker, color = _VARIANTS[variant]
            _intervals(ax, x, [getattr(one, statistic) for one in rows], fmt=marker, color=color, label=variant)
        for goal in sorted({one.goal for one in found}):
            ax.axhline(goal, color="0.7", linestyle=":", linewidth=1, zorder=0)
        ax.set(ylabel=label, ylim=(min(0, ax.get_ylim()[0]), 1.03))
    axes[1].set_xticks(range(len(attributes)), attributes)
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    return _finish(figure, f"{found[0].places}, {found[0].metric}")


def draw_effects(compared: Sequence[Compared], metric: str) -> matplotlib.figure.Figure:
    """Estimated against exact mean effects of all places, by attribute; on the line they are the same."""
    n_columns = min(4, len(compared))
    n_rows = math.ceil(len(compared) / n_columns)
    size = (2.5 * n_columns + 0.5, 2.7 * n_rows + 0.2)
    figure, axes = matplotlib.pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(compared) :]:
        ax.set_visible(False)
    for ax, one in zip(axes.flat, compared, strict=False):
        for variant, effects in one.estimates.items():
            marker, color = _VARIANTS[variant]
            exact, estimated = points(effects, one.exact, metric)
            ax.plot(exact, estimated, marker, color=color, markersize=3, alpha=0.7, label=variant)
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
        ax.set_title(one.attribute, fontsize=9)
        ax.set_xlabel("exact", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes[:, 0]:
        ax.set_ylabel("estimate", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=7)
    return _finish(figure, f"Indirect effects, {compared[0].places}, {metric}")


def draw_predictions(reports: Sequence[xarray.Dataset]) -> matplotlib.figure.Figure:
    """True against predicted changes of J, by question: of random weights above, of single layers below."""
    size = (3.0 * len(reports) + 0.3, 5.6)
    figure, axes = matplotlib.pyplot.subplots(2, len(reports), figsize=size, squeeze=False, layout="constrained")
    for column, report in zip(axes.T, reports, strict=True):
        random = (report.kind.values == "random") & (report.label.values == f"{MAIN:g}")
        for ax, chosen, title in zip(
            column, (random, report.kind.values == "layer"), (f"{MAIN:g} of the weights", "single layers"), strict=True
        ):
            rows = report.isel(ablation=numpy.flatnonzero(chosen))
            ax.plot(rows.predicted.values, rows.actual.values, "o", markersize=2.5, alpha=0.6, color=_SCORES["cad"][1])
            ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
            ax.set_title(f"{report.attrs['name']}: {title}", fontsize=8)
            ax.set_xlabel("predicted", fontsize=8)
            ax.tick_params(labelsize=7)
    for ax in axes[:, 0]:
        ax.set_ylabel("true", fontsize=8)
    return _finish(figure, "Changes of J")


def draw_choices(reports: Sequence[xarray.Dataset]) -> matplotlib.figure.Figure:
    """Change of J by ratio, true (line) and predicted (dotted), by question and scores."""
    size = (3.2 * len(reports) + 0.3, 3.2)
    figure, axes = matplotlib.pyplot.subplots(1, len(reports), figsize=size, squeeze=False, layout="constrained")
    for ax, report in zip(axes[0], reports, strict=True):
        top = report.isel(ablation=numpy.flatnonzero(report.kind.values == "top"))
        labels, whole = top.label.values.tolist(), abs(float(report.attrs["value"]))
        for scores, (marker, color) in _SCORES.items():
            rows = [labels.index(named(scores, ratio)) for ratio in RATIOS]
            ax.plot(RATIOS, top.actual.values[rows] / whole, marker=marker, color=color, markersize=4, label=scores)
            ax.plot(RATIOS, top.predicted.values[rows] / whole, ":", color=color)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(xscale="log", xlabel="share of weights set to 0")
        ax.set_title(report.attrs["name"], fontsize=9)
    axes[0][0].set_ylabel("change of J / |J|")
    axes[0][0].legend(frameon=False, fontsize=7)
    return _finish(figure, "The best weights by scores and by controls")


def draw_ablations(objective: str, rows: Sequence[Mapping]) -> matplotlib.figure.Figure:
    """Pictures without the concept, and bystanders that show what they should, by ratio and scores."""
    by_model = {row["model"]: row for row in rows}
    titles = {"gone": "of the concept: source gone", "specificity": "of bystanders: as their prompts say"}
    figure, axes = matplotlib.pyplot.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for ax, (measure, title) in zip(axes, titles.items(), strict=True):
        for i, (scores, (marker, color)) in enumerate(_SCORES.items()):
            x = numpy.array(RATIOS) * 1.06 ** (i - (len(_SCORES) - 1) / 2)
            found = [_share(by_model[named(scores, ratio)][measure]) for ratio in RATIOS]
            _intervals(ax, x, found, fmt=f"{marker}-", color=color, label=scores)
        for model, style in ((UNEDITED, ":"), ("quickfix", "--"), ("quickfix, preserving", "-.")):
            if model in by_model:
                ax.axhline(by_model[model][measure]["mean"], color="0.5", linestyle=style, linewidth=1, label=model)
        ax.set(xscale="log", xlabel="share of weights set to 0", ylim=(-0.02, 1.02))
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("share of pictures")
    axes[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _finish(figure, f"Ablations that {objective}")


def draw_shares(found: Sequence[Share]) -> matplotlib.figure.Figure:
    """What part of positive scores, negative scores and weights each kind of site has, by attribute."""
    attributes = list(dict.fromkeys(one.attribute for one in found))
    size = (3.2 * len(attributes) + 0.3, 3.2)
    figure, axes = matplotlib.pyplot.subplots(
        1, len(attributes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, attribute in zip(axes[0], attributes, strict=True):
        rows = [one for one in found if one.attribute == attribute]
        x = numpy.arange(len(rows))
        for shift, sign, color in ((-0.27, "positive", "#d98a29"), (0, "negative", "#7b6aa6")):
            values = [getattr(one, sign) for one in rows]
            ax.bar(x + shift, [one.mean for one in values], 0.25, color=color, label=f"{sign} scores")
            _intervals(ax, x + shift, values, fmt="none", ecolor="0.2")
        ax.bar(x + 0.27, [one.weights for one in rows], 0.25, color="0.75", label="weights")
        ax.set_xticks(x, [one.component.replace("_", "\n") for one in rows], fontsize=7)
        ax.set_title(attribute, fontsize=9)
    axes[0][0].set_ylabel("share of all")
    axes[0][0].legend(frameon=False, fontsize=7)
    return _finish(figure, "Scores for erasing, by kind of site")


def draw_layers(sums: Mapping[str, xarray.Dataset], causal: Mapping[str, xarray.Dataset]) -> matplotlib.figure.Figure:
    """Heat maps by site and attribute: positive scores, negative scores, and the causal map by its last metric."""
    columns = ["positive", "negative", *(["causal"] if causal else [])]
    size = (6.2 * len(columns), 2.6 * len(sums))
    figure, axes = matplotlib.pyplot.subplots(
        len(sums), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    for row, (attribute, effects) in zip(axes, sums.items(), strict=True):
        for ax, column in zip(row, columns, strict=True):
            if column != "causal":
                mediation.plot_effects(of_amount(effects, column), ax, normalize=True)
            elif attribute in causal:
                mediation.plot_effects(causal[attribute].isel(metric=-1, drop=True), ax, normalize=True)
            else:
                ax.set_visible(False)
            ax.set_title(f"{attribute}: {column}", fontsize=9)
    figure.suptitle("Scores for erasing, and indirect effects, as shares of the total", fontsize=10)
    return figure


def _share(cell: Mapping[str, float]) -> Estimate:
    return Estimate(cell["mean"], cell["low"], cell["high"])


def _intervals(ax, x: numpy.ndarray, found: Sequence[Estimate], **style) -> None:
    """Points with intervals, where there are any."""
    mean, low, high = numpy.array([(one.mean, one.low, one.high) for one in found]).T
    reach = numpy.nan_to_num(numpy.maximum(0, [mean - low, high - mean]))
    ax.errorbar(x, mean, yerr=reach, **{"markersize": 4, "elinewidth": 0.8} | style)


def _finish(figure: matplotlib.figure.Figure, title: str) -> matplotlib.figure.Figure:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure
