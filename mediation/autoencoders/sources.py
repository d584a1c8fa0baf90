"""Sources of activations for training: a pipeline that draws prompts, or an array.

A source gives its activations window by window. A window is what is held in memory and shuffled at a time, and it is
the same whenever it is asked for, so that training can stop after any of them and go on.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy
import torch
from diffusers import DiffusionPipeline

from mediation.autoencoders.observing import check_prompts, observe
from mediation.autoencoders.places import Place
from mediation.parameters import digest, sha256
from mediation.provenance import provenance
from mediation.sampling import Sampling

_N_HELD_OUT = 8192  # positions, at most
_N_HASHED = 32  # rows of an array; one each, as of a Zarr array a whole chunk is read for it


class Source(Protocol):
    """Where activations come from.

    Attributes:
        n_features: width of the activations.
        n_positions: positions that every window has, at least.
    """

    n_features: int
    n_positions: int

    def held_out(self) -> torch.Tensor:
        """Activations (position, feature) that are in no window."""

    def window(self, number: int) -> torch.Tensor:
        """Activations (position, feature) of a window, counted from 0 without end."""

    def describe(self) -> dict:
        """All that decides on the activations, as plain JSON."""


class Streamed:
    """Activations of a pipeline that draws prompts, each time from other noise; nothing is stored.

    Args:
        pipe: the pipeline.
        prompts: drawn from at random.
        place: what to read.
        sampling: how to sample.
        buffer: positions in a window, rounded up to whole pictures; while it is drawn, memory holds it, which is
            buffer × features × 4 bytes, and the activations of one call of the pipeline.
        seed: of the choice of prompts, and of the noise.
        batch_size: rows of one call of the pipeline; None suits the latents' size.

    Raises:
        KeyError, ValueError: if an argument does not fit the pipeline.

    Example:
        >>> import mediation
        >>> pipe, place = mediation.load_pipeline(), Place("unet.mid.0")
        >>> source = Streamed(pipe, ["a cat"], place, sampling=Sampling(2), buffer=40)
        >>> source.window(0).shape
        torch.Size([48, 192])
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        place: Place,
        *,
        sampling: Sampling,
        buffer: int,
        seed: int = 0,
        batch_size: int | None = None,
    ):
        if buffer < 1:
            raise ValueError(f"buffer counts positions, at least 1; got {buffer}")
        self._pipe, self._prompts, self._place, self._sampling = pipe, check_prompts(prompts), place, sampling
        self._buffer, self._seed, self._batch_size = buffer, seed, batch_size
        (first,) = observe(pipe, self._prompts[:1], [seed], [place], sampling=sampling)
        sample = first.activations[place][0]
        self.n_features, self._n_of_picture = sample.shape[-1], sample[..., 0].numel()
        self.n_positions = self._n_images(buffer) * self._n_of_picture

    def held_out(self) -> torch.Tensor:
        """Activations (position, feature) that are in no window: the same prompts, other noise."""
        return self._draw(0, min(self._buffer, _N_HELD_OUT))

    def window(self, number: int) -> torch.Tensor:
        """Activations (position, feature) of a window, counted from 0 without end."""
        return self._draw(number + 1, self._buffer)

    def describe(self) -> dict:
        """All that decides on the activations, as plain JSON."""
        return {
            "kind": "streamed",
            "place": str(self._place),
            "reads": self._place.reads,
            "n_prompts": len(self._prompts),
            "prompts": hashlib.sha256("\n".join(self._prompts).encode()).hexdigest(),
            "num_inference_steps": self._sampling.num_inference_steps,
            "guidance_scale": self._sampling.guidance_scale,
            "buffer": self._buffer,
            "seed": self._seed,
            **origin(self._pipe),
        }

    def _draw(self, stream: int, n_positions: int) -> torch.Tensor:
        n_images = self._n_images(n_positions)
        chosen, seeds = choose_prompts(len(self._prompts), n_images, seed=self._seed, stream=stream)
        found = observe(
            self._pipe,
            [self._prompts[i] for i in chosen],
            seeds,
            [self._place],
            sampling=self._sampling,
            batch_size=self._batch_size,
        )
        drawn, start = torch.empty(n_images * self._n_of_picture, self.n_features), 0
        for one in found:
            part = one.activations[self._place].flatten(0, -2)
            drawn[start : start + len(part)] = part
            start += len(part)
            del one, part  # before the next ones are there
        return drawn

    def _n_images(self, n_positions: int) -> int:
        return math.ceil(n_positions / self._n_of_picture)


class Stored:
    """Activations in an array, as `collect_activations` stores them; of a Zarr array, a window at a time is read.

    Args:
        array: (position, feature), of numpy, torch or Zarr, in any precision.
        buffer: positions in a window, at most; all windows are about equally large.
        origin: where the activations come from, as plain JSON, if that is known.

    Raises:
        ValueError: if the array has another shape, or too few positions to hold some out.

    Example:
        >>> source = Stored(numpy.arange(200.0).reshape(100, 2), buffer=50)
        >>> source.held_out().shape, source.window(0).shape, source.window(1).shape
        (torch.Size([5, 2]), torch.Size([47, 2]), torch.Size([48, 2]))
    """

    def __init__(self, array, *, buffer: int, origin: Mapping | None = None):
        if len(array.shape) != 2 or array.shape[0] < 2:
            raise ValueError(f"expected activations (position, feature), at least two; got shape {tuple(array.shape)}")
        if buffer < 1:
            raise ValueError(f"buffer counts positions, at least 1; got {buffer}")
        n_positions, self.n_features = map(int, array.shape)
        self._array, self._buffer, self._origin = array, buffer, dict(origin or {})
        self._n_kept = n_positions - max(1, min(_N_HELD_OUT, n_positions // 20))
        self._n_windows = math.ceil(self._n_kept / buffer)
        self.n_positions = self._n_kept // self._n_windows

    def held_out(self) -> torch.Tensor:
        """The last twentieth, which is in no window."""
        return self._read(self._n_kept, self._array.shape[0])

    def window(self, number: int) -> torch.Tensor:
        """Activations (position, feature) of a window; after the last, they begin anew."""
        start, stop = ((number % self._n_windows + i) * self._n_kept // self._n_windows for i in (0, 1))
        return self._read(start, stop)

    def describe(self) -> dict:
        """What is known of the array, as plain JSON, with a hash of some rows, by which it is told from others."""
        n_positions = int(self._array.shape[0])
        places = sorted({i * (n_positions - 1) // (_N_HASHED - 1) for i in range(_N_HASHED)})
        return {
            "kind": "stored",
            "shape": [n_positions, self.n_features],
            "buffer": self._buffer,
            "rows": sha256(torch.cat([self._read(i, i + 1) for i in places])),
            "origin": self._origin,
        }

    def _read(self, start: int, stop: int) -> torch.Tensor:
        found = self._array[start:stop]
        if not isinstance(found, torch.Tensor):
            found = torch.as_tensor(numpy.asarray(found))
        return found.detach().to("cpu", torch.float32)


def choose_prompts(n_prompts: int, n: int, *, seed: int, stream: int) -> tuple[list[int], list[int]]:
    """Which prompts are drawn, and from which seeds; other streams share no noise."""
    rng = numpy.random.default_rng([seed, stream])
    return rng.integers(n_prompts, size=n).tolist(), rng.integers(2**31, size=n).tolist()


def origin(pipe: DiffusionPipeline) -> dict:
    """What in a pipeline decides on its activations: names and versions, a digest of all weights, the scheduler.

    Example:
        >>> import mediation
        >>> sorted(origin(mediation.load_pipeline()))
        ['pipeline', 'scheduler', 'versions', 'weights']
    """
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    scheduler = {"class": type(pipe.scheduler).__name__} | settings
    # as text: some schedulers' settings are infinite, which JSON has no numbers for
    told = json.dumps(scheduler, sort_keys=True, default=str)
    return provenance(pipe) | {"weights": digest(pipe), "scheduler": told}
