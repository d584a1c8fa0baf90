"""Figures of the gallery: sheets of pictures with captions, and latents beside chance."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.figure
import matplotlib.pyplot
import numpy
import torch

NEUTRAL, RIGHT, WRONG = "black", "#1b7837", "#b35806"  # of captions: what a picture shows is no matter, wanted, or not


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A picture with a caption.

    Attributes:
        pixels: (y, x, channel) in [0, 1] or from 0 to 255, or a mask (y, x).
        caption: below the picture.
        color: of the caption.
    """

    pixels: numpy.ndarray
    caption: str = ""
    color: str = NEUTRAL


def cell(image: torch.Tensor, caption: str = "", color: str = NEUTRAL) -> Cell:
    """A picture (3, height, width) in [0, 1], with a caption."""
    return Cell(image.permute(1, 2, 0).clamp(0, 1).numpy(), caption, color)


def sheet(
    rows: Mapping[str, Sequence[Cell]], columns: Sequence[str] = (), width: float = 1.0
) -> matplotlib.figure.Figure:
    """Rows of pictures, each with a name on the left; columns may have names too.

    Args:
        rows: pictures by the name of their row; rows may be of different lengths.
        columns: names of columns.
        width: of a picture, in inches.
    """
    n_columns, n_letters = max(map(len, rows.values())), int(21 * width)
    captions = {name: [textwrap.wrap(one.caption, n_letters) for one in cells] for name, cells in rows.items()}
    # in inches: of a picture, of what is below it, and of all
    down, across = next(iter(rows.values()))[0].pixels.shape[:2]
    height, gap = width * down / across, 0.12 + 0.1 * max(len(lines) for one in captions.values() for lines in one)
    size = (n_columns * 1.05 * width + 1.1, len(rows) * (height + gap) + 0.25)
    figure, axes = matplotlib.pyplot.subplots(len(rows), n_columns, figsize=size, squeeze=False)
    figure.subplots_adjust(
        left=1.05 / size[0],
        right=1 - 0.02 / size[0],
        top=1 - 0.25 / size[1],
        bottom=gap / size[1],
        wspace=0.05,
        hspace=gap / height,
    )
    for line, (name, cells) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel("\n".join(textwrap.wrap(name, 16)), rotation=0, ha="right", va="center", fontsize=7)
        for i, ax in enumerate(line):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            if i < len(cells):
                ax.imshow(cells[i].pixels, cmap="gray", vmin=0, vmax=1)
                ax.set_xlabel("\n".join(captions[name][i]), fontsize=6, color=cells[i].color, labelpad=2)
    for ax, name in zip(axes[0], columns, strict=False):
        ax.set_title(name, fontsize=7)
    return figure


def beside_chance(points: Mapping[str, tuple[numpy.ndarray, numpy.ndarray]]) -> matplotlib.figure.Figure:
    """IoU over chance IoU, one panel for each kind of label; above the line is more than chance.

    Args:
        points: by kind, chance IoU and IoU, each (latent,).
    """
    size = (2.3 * len(points) + 0.6, 2.7)
    figure, axes = matplotlib.pyplot.subplots(1, len(points), figsize=size, squeeze=False, layout="constrained")
    for ax, (kind, (chance, iou)) in zip(axes[0], points.items(), strict=True):
        limit = 1.05 * max([0.1, *chance, *iou])
        ax.plot([0, limit], [0, limit], color="0.6", linewidth=0.8)
        ax.scatter(chance, iou, s=6, color="#3b528b", alpha=0.5, linewidths=0)
        ax.set_xlim(0, limit)
        ax.set_ylim(0, limit)
        ax.set_title(kind, fontsize=8)
        ax.set_xlabel("IoU by chance", fontsize=7)
        ax.tick_params(labelsize=6)
    axes[0][0].set_ylabel("IoU", fontsize=7)
    return figure
