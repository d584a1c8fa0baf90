"""Pictures of causal maps, and of what autoencoders show of a picture as it emerges."""

import textwrap

import matplotlib.axes
import matplotlib.colors
import matplotlib.pyplot
import numpy
import xarray

from mediation.autoencoders.layouts import summarize_emergence
from mediation.effects import measured_by, summarize
from mediation.schema import check

# Diverging, readable in print and for the colour-blind: negative effects purple, positive ones orange.
COLORMAP = "PuOr_r"


def plot_effects(
    effects: xarray.Dataset, ax: matplotlib.axes.Axes | None = None, *, normalize: bool = False
) -> matplotlib.axes.Axes:
    """Draws a causal map as a heat map, diverging around 0; a dot marks cells whose 95% interval excludes 0.

    Columns are token groups or windows where the map has them, and otherwise positions in execution order, with a row
    per component; in a map of single heads, columns are heads, with a row per attention. Sites that are changed
    together have rows of their own, and the column of the one in their middle.

    Colours end at the total effect, or at the largest positive one if that is larger: a site that harms a picture more
    than the corruption does is not to pale all others. The colour bar is then pointed.

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
    check(effects, one_metric=True)
    summary = summarize(effects, normalize=normalize)
    table, sure, rows, columns = _table(summary)
    if ax is None:
        size = (max(4.0, 0.42 * len(columns) + 2.6), max(1.8, 0.32 * len(rows) + 1.2))
        ax = matplotlib.pyplot.subplots(figsize=size, layout="constrained")[1]
    largest = numpy.nanmax(numpy.abs(table), initial=1e-12)
    total = 1.0 if normalize else abs(float(summary.total))
    limit = min(largest, numpy.nanmax(table, initial=total))
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
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, extend="min" if largest > limit else "neither")
    bar.set_label(_quantity(effects, normalize))
    return ax


def plot_bars(
    effects: xarray.Dataset, by: str = "component", ax: matplotlib.axes.Axes | None = None, *, normalize: bool = False
) -> matplotlib.axes.Axes:
    """Draws mean indirect effects as bars with 95% bootstrap intervals, over a grey band: the noise floor.

    Args:
        effects: from `mediation.trace`, of one metric.
        by: one group of bars for each label of this coordinate, as in `mediation.summarize`; within it, one bar for
            each token or window.
        ax: where to draw; None makes a new figure.
        normalize: draws IE / TE, the share of the total effect that a site brings back.

    Returns:
        The axes.

    Raises:
        ValueError: if the map has several metrics, or sites have no such coordinate.

    Example:
        >>> from mediation.effects import _example
        >>> ax = plot_bars(_example(), by="site")
        >>> [float(bar.get_height()) for bar in ax.patches[:2]]
        [1.0, 0.0]
        >>> matplotlib.pyplot.close(ax.figure)
    """
    check(effects, one_metric=True)
    summary = summarize(effects, by=by, normalize=normalize)
    groups = _labels(summary.site) if by == "site" else [str(label).replace("_", " ") for label in summary[by].values]
    inner = [dim for dim in summary["mean"].dims if dim != by]
    labels = [str(label) for label in summary[inner[0]].values] if inner else [None]
    mean, low, high = (
        summary[name].transpose(by, ...).values.reshape(len(groups), len(labels)) for name in ("mean", "low", "high")
    )
    if ax is None:
        ax = matplotlib.pyplot.subplots(figsize=(max(4.0, 0.3 * mean.size + 2), 3.2), layout="constrained")[1]
    width = 0.8 / len(labels)
    colors = matplotlib.pyplot.get_cmap("cividis")(numpy.linspace(0.1, 0.9, len(labels)))
    for j, label in enumerate(labels):
        ax.bar(
            numpy.arange(len(groups)) + (j - (len(labels) - 1) / 2) * width,
            mean[:, j],
            0.92 * width,
            yerr=numpy.maximum(0, [(mean - low)[:, j], (high - mean)[:, j]]),
            color=colors[j],
            ecolor="0.35",
            label=label,
        )
    floor = float(summary.noise_floor) / (abs(float(summary.total)) if normalize else 1)
    ax.axhspan(-floor, floor, color="0.88", zorder=0)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(groups)), groups, rotation=90 if sum(map(len, groups)) > 60 else 0)
    ax.set_ylabel(_quantity(effects, normalize))
    if inner:
        ax.legend(title=inner[0], fontsize="small")
    return ax


def plot_images(
    effects: xarray.Dataset, ax: matplotlib.axes.Axes | None = None, *, draw: int = 0
) -> matplotlib.axes.Axes:
    """Draws a strip of images per case: clean, corrupted, and with each site restored (or knocked out).

    Args:
        effects: from `mediation.trace(…, images=…)`, of one token and one window.
        ax: where to draw; None makes a new figure.
        draw: which draw of the corruption.

    Returns:
        The axes.

    Raises:
        ValueError: if the map keeps no images, or those of several tokens or windows.

    Example:
        >>> import mediation
        >>> pipe = mediation.load_pipeline()
        >>> case = mediation.Case("a cat in the style of ink", subject="ink")
        >>> effects = mediation.trace(pipe, case, sites=["unet.mid.0.resnet"], images="all", num_inference_steps=1)
        >>> ax = mediation.plot_images(effects)
        >>> len(ax.get_xticklabels())
        3
        >>> matplotlib.pyplot.close(ax.figure)
    """
    check(effects)
    if "clean_image" not in effects:
        raise ValueError('this map keeps no images: pass images="all", or sites, to mediation.trace')
    columns, images = ["clean", "corrupted"], [effects.clean_image, effects.corrupted_image]
    if "restored_image" in effects:
        for dim in ("token", "window"):
            if dim in effects.restored_image.dims:
                raise ValueError(f"choose one {dim}: effects.sel({dim}=…) of {effects[dim].values.tolist()}")
        pictured = effects.restored_image
        columns += ["\n".join(name.rsplit(".", 1)) for name in _labels(pictured.image_site)]
        images += [pictured.sel(image_site=name) for name in pictured.image_site.values]
    images = [image.isel(draw=draw).transpose("case", "y", "x", "channel") for image in images]
    rows = effects.prompt.values.tolist() if "prompt" in effects.coords else [str(i) for i in range(len(images[0]))]
    _, height, width, _ = images[0].shape
    gap = max(1, height // 16)
    cells = [numpy.pad(x.values, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for x in images]
    canvas = numpy.concatenate(numpy.concatenate(cells, axis=2), axis=0)[:-gap, :-gap]
    if ax is None:
        size = (1.2 * len(columns) + 1, 1.2 * len(rows) + 0.6)
        ax = matplotlib.pyplot.subplots(figsize=size, layout="constrained")[1]
    ax.imshow(canvas.astype(numpy.uint8))
    ax.set_xticks(numpy.arange(len(columns)) * (width + gap) + (width - 1) / 2, columns)
    ax.set_yticks(numpy.arange(len(rows)) * (height + gap) + (height - 1) / 2, [textwrap.fill(row, 22) for row in rows])
    ax.tick_params(length=0, labelsize=7)
    ax.spines[:].set_visible(False)
    return ax


def plot_emergence(
    found: xarray.Dataset, measure: str = "miou", ax: matplotlib.axes.Axes | None = None
) -> matplotlib.axes.Axes:
    """Draws a measure of emergence over sampling: a line with 95% intervals for each site and branch.

    Beside the mIoU stand its controls: another picture's latents, dashed, and a constant layout, dotted.

    Args:
        found: from `mediation.emergence`.
        measure: as of `mediation.summarize_emergence`.
        ax: where to draw; None makes a new figure.

    Returns:
        The axes; the first step is on the left.

    Raises:
        ValueError: if there is no such measure.

    Example:
        >>> from mediation.autoencoders.layouts import _example
        >>> ax = plot_emergence(_example())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ["another picture's latents", 'constant layout', 'unet.mid.0, cond']
        >>> matplotlib.pyplot.close(ax.figure)
    """
    summary = summarize_emergence(found)
    if measure not in summary.measure.values:
        raise ValueError(f"measure must be one of {', '.join(summary.measure.values.tolist())}; got {measure!r}")
    if ax is None:
        ax = matplotlib.pyplot.subplots(figsize=(6.8, 3.4), layout="constrained")[1]
    sites = list(dict.fromkeys(summary.site.values.tolist()))
    colors = matplotlib.pyplot.get_cmap("cividis")(numpy.linspace(0.1, 0.85, len(sites)))
    lines = dict.fromkeys(zip(summary.site.values.tolist(), summary.branch.values.tolist(), strict=True))
    for i, (site, branch) in enumerate(lines):
        own = summary.isel(autoencoder=((summary.site == site) & (summary.branch == branch)).values).sortby("t")
        here, color = own.sel(measure=measure), colors[sites.index(site)]
        ax.errorbar(
            own.t.values + 0.012 * (i - (len(lines) - 1) / 2),  # side by side, so that none hides another
            here["mean"].values,
            yerr=numpy.maximum(0, [here["mean"] - here.low, here.high - here["mean"]]),
            color=color,
            marker="o" if branch == "cond" else "s",
            markerfacecolor=color if branch == "cond" else "white",
            capsize=3,
            label=f"{site}, {branch}",
        )
        if measure == "miou":
            chance = own["mean"].sel(measure="chance_miou")
            ax.plot(own.t.values, chance.values, color=color, linestyle="--", linewidth=1)
    if measure == "miou":
        ax.lines[-1].set_label("another picture's latents")
        constant = summary["mean"].sel(measure="constant_miou").groupby("t").mean()
        ax.plot(constant.t.values, constant.values, color="black", linestyle=":", linewidth=1, label="constant layout")
    ax.set_xlim(1.08, -0.08)
    ax.set_xlabel("t, what is left of sampling")
    ax.set_ylabel({"miou": "mIoU of the predicted layout"}.get(measure, measure.replace("_", " ")))
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _quantity(effects: xarray.Dataset, normalize: bool) -> str:
    return "IE / TE" if normalize else f"indirect effect\non {measured_by(effects) or 'the metric'}"


def _table(summary: xarray.Dataset) -> tuple[numpy.ndarray, numpy.ndarray, list[str], list[str]]:
    """Values and marks (row, column), and the labels of rows and columns; cells without a site are NaN."""
    mean = summary["mean"]
    sure = ((summary["low"] > 0) | (summary["high"] < 0)).transpose(*mean.dims)
    if mean.ndim == 2:
        return mean.values, sure.values, _labels(mean.site), [str(label) for label in mean[mean.dims[1]].values]
    cells = _cells(mean)
    if cells is None:
        return mean.values[None], sure.values[None], [""], _labels(mean.site)
    rows, columns = (list(dict.fromkeys(labels)) for labels in zip(*cells, strict=True))
    table = numpy.full((len(rows), len(columns)), numpy.nan)
    marks = numpy.zeros(table.shape, dtype=bool)
    for value, mark, (row, column) in zip(mean.values, sure.values, cells, strict=True):
        cell = rows.index(row), columns.index(column)
        table[cell], marks[cell] = value, mark
    return table, marks, rows, columns


def _cells(mean: xarray.DataArray) -> list[tuple[str, str]] | None:
    """Row and column of every site, no two alike: its component and position, or its attention and head.

    Sites that are changed together have rows of their own, and the column of the site in their middle. None if the map
    says of no site what it is, or mixes heads with other sites.
    """
    groups = [str(name).split("+") for name in mean.site.values]
    heads = mean["head"].values.tolist() if "head" in mean.coords else [-1] * len(groups)
    if "component" not in mean.coords or len({head >= 0 for head in heads}) > 1:
        return None
    networks = mean.network.values if "network" in mean.coords else [group[0].partition(".")[0] for group in groups]
    several = len(set(networks)) > 1
    cells = []
    for name, group, network, component, head in zip(
        _labels(mean.site), groups, networks, mean.component.values, heads, strict=True
    ):
        if head >= 0:
            row, column = name.rsplit(".head.", 1)
        else:
            kind = f"{network} {component}" if several else str(component)
            row = kind.replace("_", " ").replace("+", " + ") + _together(group)
            middle = group[len(group) // 2].partition(".head.")[0]
            column = middle.partition(".")[2].rpartition(".")[0]  # of "unet.mid.0.resnet", mid.0
        cells.append((name if (row, column) in cells else row, column))
    return cells


def _labels(sites: xarray.DataArray) -> list[str]:
    """Names of sites, without the network if all share it; of sites together, the middle one's and their number."""
    groups = [str(name).split("+") for name in sites.values]
    members = [name for group in groups for name in group]
    if len({name.partition(".")[0] for name in members}) == 1 and all("." in name for name in members):
        groups = [[name.partition(".")[2] for name in group] for group in groups]
    labels = [group[len(group) // 2] + _together(group) for group in groups]
    return labels if len(set(labels)) == len(labels) else ["+".join(group) for group in groups]


def _together(group: list[str]) -> str:
    return f", {len(group)} together" if len(group) > 1 else ""
