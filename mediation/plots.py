"""Pictures of causal maps."""

import matplotlib.axes
import matplotlib.colors
import matplotlib.pyplot
import numpy
import xarray

from mediation.effects import summarize

# Diverging, readable in print and for the colour-blind: negative effects purple, positive ones orange.
COLORMAP = "PuOr_r"


def plot_effects(
    effects: xarray.Dataset, ax: matplotlib.axes.Axes | None = None, *, normalize: bool = False
) -> matplotlib.axes.Axes:
    """Draws a causal map as a heat map, diverging around 0; a dot marks cells whose 95% interval excludes 0.

    Columns are token groups or windows where the map has them, and otherwise positions in execution order, with a row
    per component; in a map of single heads, columns are heads, with a row per attention.

    Args:
        effects: from `mediation.trace`, of one metric.
        ax: where to draw; None makes a new figure.
        normalize: draws IE / TE, the share of the total effect that a site brings back.

    Returns:
        The axes.

    Raises:
        ValueError: if the map has several metrics.

    Example:
        >>> import mediation
        >>> case = mediation.Case("a cat in the style of ink", subject="ink")
        >>> pipe = mediation.load_pipeline()
        >>> effects = mediation.trace(pipe, case, sites=["unet.mid.0.resnet"], num_inference_steps=1)
        >>> ax = mediation.plot_effects(effects)
        >>> matplotlib.pyplot.close(ax.figure)
    """
    if "metric" in effects.dims:
        raise ValueError(f"choose one metric: effects.sel(metric=…) of {list(effects.metric.values)}")
    summary = summarize(effects, normalize=normalize)
    table, sure, rows, columns = _table(summary)
    if ax is None:
        size = (max(4.0, 0.42 * len(columns) + 2.6), max(1.8, 0.32 * len(rows) + 1.2))
        ax = matplotlib.pyplot.subplots(figsize=size, layout="constrained")[1]
    limit = numpy.nanmax(numpy.abs(table), initial=1e-12)
    colors = matplotlib.pyplot.get_cmap(COLORMAP).with_extremes(bad="0.88")
    image = ax.imshow(table, cmap=colors, vmin=-limit, vmax=limit, aspect="auto")
    y, x = numpy.nonzero(sure)
    ax.scatter(x, y, s=6, color="black", linewidths=0)
    ax.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 3 else 0)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.set_xticks(numpy.arange(0.5, len(columns) - 1), minor=True)
    ax.set_yticks(numpy.arange(0.5, len(rows) - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="minor", length=0)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("IE / TE" if normalize else f"indirect effect\non {effects.attrs.get('metric', 'the metric')}")
    return ax


def _table(summary: xarray.Dataset) -> tuple[numpy.ndarray, numpy.ndarray, list[str], list[str]]:
    """Values and marks (row, column), and the labels of rows and columns; cells without a site are NaN."""
    mean = summary["mean"]
    sure = ((summary["low"] > 0) | (summary["high"] < 0)).transpose(*mean.dims)
    names = [str(name) for name in mean.site.values]
    if mean.ndim == 2:
        rows = _shorten(names)
        return mean.values, sure.values, rows, [str(label) for label in mean[mean.dims[1]].values]
    are_heads = {".head." in name for name in names}
    if "component" not in mean.coords or len(are_heads) > 1:
        return mean.values[None], sure.values[None], [""], _shorten(names)
    if are_heads == {True}:
        attentions, columns_of = zip(*(name.rsplit(".head.", 1) for name in names), strict=True)
        rows_of = _shorten(list(attentions))
    else:
        columns_of = _shorten([name.rsplit(".", 1)[0] for name in names])
        rows_of = [str(component).replace("_", " ") for component in mean.component.values]
    rows, columns = list(dict.fromkeys(rows_of)), list(dict.fromkeys(columns_of))
    table = numpy.full((len(rows), len(columns)), numpy.nan)
    marks = numpy.zeros(table.shape, dtype=bool)
    for value, mark, row, column in zip(mean.values, sure.values, rows_of, columns_of, strict=True):
        cell = rows.index(row), columns.index(column)
        table[cell], marks[cell] = value, mark
    return table, marks, rows, columns


def _shorten(names: list[str]) -> list[str]:
    """Leaves the network out of names that all share it."""
    networks = {name.split(".", 1)[0] for name in names}
    if len(networks) > 1 or not all("." in name for name in names):
        return names
    return [name.split(".", 1)[1] for name in names]
