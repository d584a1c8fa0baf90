"""Tallies: how often latents are active where pictures have labels, and in which pictures they are most active."""

import collections
from collections.abc import Mapping

import numpy
import torch
import torch.nn.functional as F
import xarray

N_FOLDS = 2


class Tally:
    """Counts, picture by picture; memory does not grow with the pictures.

    Args:
        n_latents: how many latents there are.
        n_top: pictures to remember for each latent.

    Example:
        >>> tally = Tally(n_latents=1, n_top=1)
        >>> left = torch.tensor([[True, False]])
        >>> for _ in range(2):
        ...     tally.add(torch.tensor([[[[3.0], [0.0]]]]), {"left": left})
        >>> tally.finish().iou.item()
        1.0
    """

    def __init__(self, n_latents: int, n_top: int):
        # by (prefix, label): with "chance_", masks are those of the picture before
        self._overlap = collections.defaultdict(lambda: torch.zeros(N_FOLDS, n_latents, dtype=torch.float64))
        self._area = collections.defaultdict(lambda: torch.zeros(N_FOLDS, dtype=torch.float64))
        self._active = torch.zeros(N_FOLDS, n_latents, dtype=torch.float64)
        self._n_positions = torch.zeros(N_FOLDS, dtype=torch.float64)
        self._n = torch.zeros(n_latents, dtype=torch.long)
        self._n_pictures = 0
        self._top = torch.full((n_latents, n_top), -1.0)
        self._top_image = torch.zeros(n_latents, n_top, dtype=torch.long)
        self._top_map: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._previous: dict[str, torch.Tensor] = {}

    def add(self, latents: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> None:
        """Counts a picture: its latents (step, y, x, latent) and its masks (height, width) by label."""
        active = (latents > 0).flatten(0, 2)
        n_steps, *size, _ = latents.shape
        covered = {label: on_grid(mask, tuple(size)).flatten().repeat(n_steps) for label, mask in masks.items()}
        fold = self._n_pictures % N_FOLDS
        self._count("", active, covered, fold)
        if self._first is None:
            self._first = active
        else:
            self._count("chance_", active, self._previous, fold)
        self._previous = covered
        self._active[fold] += active.sum(0)
        self._n_positions[fold] += len(active)
        self._n += active.any(0)
        self._keep_top(latents.amax(0).permute(2, 0, 1))
        self._n_pictures += 1

    def finish(self) -> xarray.Dataset:
        """The counts, and what follows from them, as `mediation.concept_dictionary` says; ends the tally.

        Raises:
            ValueError: if there was no label at all.
        """
        self._count("chance_", self._first, self._previous, 0)  # the first picture has none before it: takes the last
        labels = [label for prefix, label in self._area if not prefix]
        if not labels:
            raise ValueError("the labeller found nothing in any picture: there is nothing to compare latents with")
        found = xarray.Dataset(coords={"fold": range(N_FOLDS), "latent": numpy.arange(len(self._n)), "label": labels})
        for prefix in ("", "chance_"):
            overlap = torch.stack([self._overlap[prefix, label] for label in labels], dim=-1)
            area = torch.stack([self._area[prefix, label] for label in labels], dim=-1)
            found[f"{prefix}overlap"] = (("fold", "latent", "label"), overlap.numpy())
            found[f"{prefix}area"] = (("fold", "label"), area.numpy())
        found["active"] = (("fold", "latent"), self._active.numpy())
        found["n_positions"] = ("fold", self._n_positions.numpy())
        found = found.assign(agreement(found.sum("fold")))
        found["n"] = ("latent", self._n.numpy())
        found["top_image"] = (("latent", "top"), self._top_image.numpy())
        found["top_activation"] = (("latent", "top"), self._top.clamp(min=0).numpy())
        found["top_map"] = (("latent", "top", "y", "x"), self._top_map.numpy())
        return found

    def _count(self, prefix: str, active: torch.Tensor, covered: Mapping[str, torch.Tensor], fold: int) -> None:
        for label, mask in covered.items():
            self._overlap[prefix, label][fold] += active[mask].sum(0)
            self._area[prefix, label][fold] += mask.sum()

    def _keep_top(self, maps: torch.Tensor) -> None:
        """Remembers the picture, and its maps (latent, y, x), where they are among the most active."""
        if self._top_map is None:
            self._top_map = torch.zeros(*self._top.shape, *maps.shape[1:])
        peaks = maps.flatten(1).amax(1)
        rows = (peaks > self._top[:, -1].clamp(min=0)).nonzero()[:, 0]
        self._top[rows, -1], self._top_image[rows, -1], self._top_map[rows, -1] = (
            peaks[rows],
            self._n_pictures,
            maps[rows],
        )
        order = self._top[rows].argsort(dim=1, descending=True, stable=True)
        for kept in (self._top, self._top_image, self._top_map):
            kept[rows] = kept[rows][torch.arange(len(rows))[:, None], order]


def on_grid(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A mask (height, width) at another size: whether at least half of each cell is covered.

    Example:
        >>> on_grid(torch.tensor([[True, True], [False, True], [False, False], [False, False]]), (2, 1)).tolist()
        [[True], [False]]
    """
    return F.adaptive_avg_pool2d(mask[None].float(), size)[0] >= 0.5


def agreement(counts: xarray.Dataset, prefix: str = "") -> dict[str, xarray.DataArray]:
    """iou, precision and recall of counts, NaN where they are of nothing; with "chance_", of mismatched pictures."""
    overlap, area = counts[f"{prefix}overlap"], counts[f"{prefix}area"]
    parts = {"iou": counts.active + area - overlap, "precision": counts.active, "recall": area}
    return {name: (overlap / whole.where(whole > 0)).transpose("latent", "label") for name, whole in parts.items()}
