"""Pictures of an evaluation: what became of each aim, and sheets of pictures before and after."""

import textwrap

import matplotlib.axes
import matplotlib.figure
import matplotlib.pyplot
import numpy
import xarray

from editing.scores import summarize_evaluation

_COLORS = {"is_source": "#7b6aa6", "is_target": "#d98a29"}
_NAMES = {"is_source": "shows the source", "is_target": "shows the target"}


def plot_evaluation(report: xarray.Dataset, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """Draws the share of pictures that show the source and the target, by role and model, with 95% intervals.

    Args:
        report: from `evaluate`, with a classifier.
        ax: where to draw; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: if nothing was classified.

    Example:
        >>> from editing.scores import _example
        >>> ax = plot_evaluation(_example())
        >>> matplotlib.pyplot.close(ax.figure)
    """
    summary = summarize_evaluation(report)
    measures = [measure for measure in _NAMES if measure in summary.measure]
    if not measures:
        raise ValueError("nothing was classified: pass classifiers to editing.evaluate")
    roles, models = summary.role.values.tolist(), summary.model.values.tolist()
    if ax is None:
        size = (3.2 + 0.5 * len(roles) * len(models), 3.2)
        ax = matplotlib.pyplot.subplots(figsize=size, layout="constrained")[1]
    # A group of models for each role, and a gap between groups.
    places = numpy.arange(len(roles))[:, None] * (len(models) + 0.7) + numpy.arange(len(models))
    width = 0.8 / len(measures)
    for i, measure in enumerate(measures):
        cells = summary.sel(measure=measure)
        x = places + width * (i - (len(measures) - 1) / 2)
        ax.bar(x.ravel(), cells["mean"].values.ravel(), width, color=_COLORS[measure], label=_NAMES[measure])
        ax.vlines(x.ravel(), cells.low.values.ravel(), cells.high.values.ravel(), color="0.2", linewidth=1)
    ax.set_xticks(places.ravel(), models * len(roles), rotation=45, ha="right", rotation_mode="anchor")
    for row, role in zip(places, roles, strict=True):
        ax.text(row.mean(), 1.03, role, ha="center")
    ax.set_ylim(0, 1)
    ax.set_ylabel("share of pictures")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_sheet(report: xarray.Dataset, *, n: int = 6, seed: int | None = None) -> matplotlib.figure.Figure:
    """Draws pictures before and after: for each role the first prompts, and a row for each model.

    Args:
        report: from `evaluate(…, keep_images=True)`.
        n: prompts of each role.
        seed: which of the seeds; None is the first.

    Returns:
        The figure.

    Raises:
        KeyError: if the seed was not drawn.
        ValueError: if the report has no images.
    """
    if "images" not in report:
        raise ValueError("the report has no images: call editing.evaluate with keep_images=True")
    images = report.images.sel(seed=report.seed.values[0] if seed is None else seed).transpose("trial", "model", ...)
    roles, models = list(dict.fromkeys(report.role.values.tolist())), report.model.values.tolist()
    columns = min(n, max((report.role == role).values.sum() for role in roles))
    size = (max(3.5, 1.5 * columns + 0.5), (1.5 * len(models) + 0.8) * len(roles))
    figure = matplotlib.pyplot.figure(figsize=size, layout="constrained")
    for half, role in zip(numpy.atleast_1d(figure.subfigures(len(roles), 1)), roles, strict=True):
        half.suptitle(role, fontweight="bold")
        axes = half.subplots(len(models), columns, squeeze=False)
        chosen = numpy.flatnonzero(report.role.values == role)[:columns]
        for ax in axes.ravel():
            ax.set(xticks=[], yticks=[])
            ax.set_visible(False)
        for column, trial in enumerate(chosen):
            for row, model in enumerate(models):
                ax = axes[row, column]
                ax.set_visible(True)
                ax.imshow(images.values[trial, row])
                if column == 0:
                    ax.set_ylabel(model)
            ax.set_xlabel("\n".join(textwrap.wrap(str(report.prompt.values[trial]), 22)), fontsize=7)
    return figure
