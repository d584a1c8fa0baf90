"""The images of a trace that were asked for, kept as bytes."""

from collections.abc import Sequence

import numpy
import torch

from mediation.plans import Plan
from mediation.rows import CLEAN, CORRUPTED, N_CONTROLS

# the image variable that a row belongs to, and its index there, behind (case, draw)
Place = tuple[str, tuple[int, ...]]


class Album:
    """Collects clean and corrupted images, and restored ones of the sites that a plan names.

    An image takes height × width × 3 bytes, and arrays of them are made when the first one arrives.

    Attributes:
        arrays: by variable, uint8 images (case, draw[, image_site, token, window], y, x, channel); black where nothing
            was restored.
    """

    def __init__(self, plan: Plan):
        self.arrays: dict[str, numpy.ndarray] = {}
        self._plan = plan

    def places(self, chunk: Sequence[tuple[tuple[int, int, int] | None, object]]) -> dict[int, Place]:
        """The rows of a chunk of (index, intervention) whose images are kept; the index None brings the controls."""
        pictured, places = self._plan.pictured, {}
        if pictured is None:
            return places
        for row, (index, _) in enumerate(chunk, start=N_CONTROLS):
            if index is None:
                places |= {CLEAN: ("clean_image", ()), CORRUPTED: ("corrupted_image", ())}
            elif index[0] in pictured:
                places[row] = "restored_image", (pictured.index(index[0]), *index[1:])
        return places

    def add(self, case: int, draw: int, places: Sequence[Place], images: torch.Tensor) -> None:
        """Keeps images (place, 3, height, width) in [0, 1]."""
        pixels = (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for (name, index), image in zip(places, pixels, strict=True):
            if name not in self.arrays:
                inner = (len(self._plan.pictured), *self._plan.shape[1:]) if index else ()
                shape = (len(self._plan.cases), self._plan.n_draws, *inner, *image.shape)
                self.arrays[name] = numpy.zeros(shape, numpy.uint8)
            self.arrays[name][(case, draw, *index)] = image
