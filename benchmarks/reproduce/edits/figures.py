"""Results as figures."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib.figure
import matplotlib.lines
import matplotlib.pyplot
import numpy

from benchmarks.reproduce.edits.causal import Agreement
from benchmarks.reproduce.edits.experiments import EXPERIMENTS
from benchmarks.reproduce.edits.pages import Result
from editing.evaluation import UNEDITED

_N_COLUMNS = 4
# Told apart by colour and by shape.
_SHARES = {
    "gone": ("source gone", "o", "#7b6aa6"),
    "target": ("target shown", "s", "#d98a29"),
    "specificity": ("specificity", "^", "#3f8f8b"),
}
_COMPONENTS = {"self_attention": ("self-attention", "#7b6aa6"), "mlp": ("MLP", "#d98a29")}


def draw(
    results: Sequence[Result], agreements: Mapping[str, Sequence[Agreement]]
) -> Iterator[tuple[str, matplotlib.figure.Figure]]:
    """Every figure with its name: one for each experiment, and more where there is something to tell apart."""
    for experiment in dict.fromkeys(result.experiment for result in results):
        chosen, title = [r for r in results if r.experiment == experiment], EXPERIMENTS[experiment].question
        if experiment == "lambdas":
            recipes = chosen[0].recipes
            for method in dict.fromkeys(recipe.method for recipe in recipes.values()):
                x_of = {name: recipe.regularization for name, recipe in recipes.items() if recipe.method == method}
                yield f"lambdas_{method}", draw_curves(chosen, x_of, "lambda", f"{method}: {title}")
        elif experiment == "concepts":
            x_of = {result.group: int(result.group.split()[0]) for result in chosen}
            yield "concepts", draw_curves(_by_model(chosen), x_of, "concepts edited at once", title)
        else:
            yield experiment, draw_shares(chosen, title)
    if agreements:
        yield "layers_against_map", draw_agreements(agreements, "Edits by place against the causal map")


def draw_shares(results: Sequence[Result], title: str) -> matplotlib.figure.Figure:
    """For each group a panel, with a line for every model: shares with 95% intervals."""
    names = [[row["model"] for row in result.rows] for result in results]
    alike = all(one == names[0] for one in names)
    size = ((2.3 if alike else 4.6) * len(results) + 2, 0.24 * max(map(len, names)) + 1.4)
    figure, axes = matplotlib.pyplot.subplots(1, len(results), figsize=size, squeeze=False, layout="constrained")
    for ax, result, models in zip(axes[0], results, names, strict=True):
        ax.set_yticks(range(len(models)), models, fontsize=7)
        ax.tick_params(labelleft=not alike or ax is axes[0][0])
        ax.set_ylim(len(models) - 0.5, -0.5)
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        for offset, name, kept, (mean, low, high) in _shares(result.rows):
            style = _style(name) | {"linestyle": "none"}
            ax.errorbar(mean, numpy.array(kept) + 0.2 * offset, xerr=_lengths(mean, low, high), **style)
        ax.set(xlim=(-0.02, 1.02), xlabel="share of pictures")
        ax.set_title(result.group, fontsize=9)
    _finish(figure, title)
    return figure


def draw_curves(
    results: Sequence[Result], x_of: Mapping[str, float], xlabel: str, title: str
) -> matplotlib.figure.Figure:
    """For each group a panel of shares against a number, with the unedited model's specificity as a line.

    Args:
        results: groups, whose rows share a model's kind.
        x_of: model -> the number; models without one are left out.
        xlabel: what the number is.
        title: of the figure.
    """
    size = (3.6 * len(results) + 1.5, 3.4)
    figure, axes = matplotlib.pyplot.subplots(
        1, len(results), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, result in zip(axes[0], results, strict=True):
        rows = [row for row in result.rows if row["model"] in x_of]
        x = numpy.array([x_of[row["model"]] for row in rows])
        for _, name, kept, (mean, low, high) in _shares(rows):
            ax.errorbar(x[kept], mean, yerr=_lengths(mean, low, high), linestyle="-", **_style(name))
        for row in result.rows:
            if row["model"] == UNEDITED:
                ax.axhline(row["specificity"]["mean"], color=_SHARES["specificity"][2], linestyle=":", linewidth=1)
        ax.set(xscale="log", xlabel=xlabel, ylim=(-0.02, 1.02))
        ax.set_title(result.group, fontsize=9)
    axes[0][0].set_ylabel("share of pictures")
    _finish(figure, title)
    return figure


def draw_agreements(agreements: Mapping[str, Sequence[Agreement]], title: str) -> matplotlib.figure.Figure:
    """For each attribute and choice of tokens a panel: merit of the edit against indirect effect, by layer."""
    found = [(attribute, one) for attribute, ones in agreements.items() for one in ones]
    n_rows, n_columns = math.ceil(len(found) / _N_COLUMNS), min(len(found), _N_COLUMNS)
    size = (3.2 * n_columns + 0.5, 3.2 * n_rows)
    figure, axes = matplotlib.pyplot.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(found) :]:
        ax.remove()
    for ax, (attribute, one) in zip(axes.flat, found, strict=False):
        for site, x, y in zip(one.sites, one.effects, one.merits, strict=True):
            _, layer, component = site.rsplit(".", 2)
            ax.plot(x, y, marker=f"${layer}$", markersize=7, markeredgewidth=0.3, color=_COMPONENTS[component][1])
        ax.set_title(f"{attribute}, {one.tokens}: rho {one.rho:.2f}", fontsize=9)
        ax.set(xlabel="indirect effect", ylabel="merit of the edit")
        ax.spines[["top", "right"]].set_visible(False)
    marks = [
        matplotlib.lines.Line2D([], [], ls="", marker="$0$", c=color, label=name)
        for name, color in _COMPONENTS.values()
    ]
    figure.legend(
        handles=marks, loc="outside lower center", ncols=len(marks), title="layer of", frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    return figure


def _by_model(results: Sequence[Result]) -> list[Result]:
    """The same rows, with models for groups and groups for models."""
    models = [row["model"] for row in results[0].rows]
    return [
        dataclasses.replace(
            results[0],
            group=model,
            rows=[row | {"model": result.group} for result in results for row in result.rows if row["model"] == model],
        )
        for model in models
    ]


def _shares(rows: Sequence[Mapping]) -> Iterator[tuple[int, str, list[int], numpy.ndarray]]:
    """For each share: its place among them (-1, 0, 1), its name, the rows that have it, and their means and bounds."""
    for offset, name in enumerate(_SHARES, start=-1):
        kept = [i for i, row in enumerate(rows) if row[name] is not None]
        yield offset, name, kept, numpy.array([[rows[i][name][key] for i in kept] for key in ("mean", "low", "high")])


def _style(name: str) -> dict[str, object]:
    label, marker, color = _SHARES[name]
    return {"label": label, "marker": marker, "color": color, "markersize": 4, "elinewidth": 0.8}


def _lengths(mean: numpy.ndarray, low: numpy.ndarray, high: numpy.ndarray) -> numpy.ndarray:
    # Wilson's interval of a share of 1 ends at 1 but for rounding.
    return numpy.maximum(0, [mean - low, high - mean])


def _finish(figure: matplotlib.figure.Figure, title: str) -> None:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
