"""Places: where in the denoiser activations are read or changed, when in sampling, and in which half of guidance.

Time is t, what is left of sampling: 1 at the first step, 0 at the last (Tinaz et al. 2025, arXiv:2504.15473).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline

from mediation.hooks import announced, hooked
from mediation.pipelines import family_of
from mediation.sites import Site, sites

BRANCHES = ("cond", "uncond")
READS = ("update", "output")


@dataclasses.dataclass(frozen=True)
class Place:
    """What an autoencoder reads: a site, at some steps, in one half of guidance.

    Args:
        site: the name of a site of the denoiser; a position alone, as "unet.mid.0", is the transformer there.
        steps: t, from 1 at the first step of sampling to 0 at the last; of a sampler's steps, the nearest counts.
        branch: "cond" or "uncond".
        reads: "update" is what a transformer adds to its input, and of any other site its output; "output" is the
            output of a transformer too.

    Raises:
        ValueError: if steps lie outside [0, 1], or a name is none of the above.

    Example:
        >>> print(Place("unet.mid.0", steps=[1, 0.5]))
        unet.mid.0 at t=1, 0.5, cond
    """

    site: str
    steps: tuple[float, ...] = (1.0,)
    branch: str = "cond"
    reads: str = "update"

    def __post_init__(self):
        object.__setattr__(self, "steps", tuple(float(t) for t in self.steps))
        if not self.steps or not all(0 <= t <= 1 for t in self.steps):
            raise ValueError(f"steps are numbers from 1 (the first step) to 0 (the last), got {self.steps}")
        if self.branch not in BRANCHES:
            raise ValueError(f"branch must be {' or '.join(map(repr, BRANCHES))}, got {self.branch!r}")
        if self.reads not in READS:
            raise ValueError(f"reads must be {' or '.join(map(repr, READS))}, got {self.reads!r}")

    def as_json(self) -> dict:
        """The arguments, as plain JSON."""
        return dataclasses.asdict(self) | {"steps": list(self.steps)}

    def __str__(self) -> str:
        return f"{self.site} at t={', '.join(f'{t:g}' for t in self.steps)}, {self.branch}"


class Moment(NamedTuple):
    """A call of the denoiser in the course of sampling.

    Attributes:
        index: of the step, from 0; steps at the same noise level count once.
        n_steps: how many there are.
        halves: what the halves of the batch are, in their order.
    """

    index: int
    n_steps: int
    halves: tuple[str, ...]

    @property
    def t(self) -> float:
        """What is left of sampling."""
        # rounded, so that 1 − 0.4 is 0.6 and stages that meet at 0.6 share no step
        return 1.0 if self.n_steps == 1 else round(1 - self.index / (self.n_steps - 1), 9)


# What happens to activations (half, row, y, x, feature) at some moment; what it returns is added to them.
Visit = Callable[[Moment, torch.Tensor], torch.Tensor | None]


def nearest_step(t: float, n_steps: int) -> int:
    """The index of the step nearest to t.

    Example:
        >>> [nearest_step(t, 11) for t in (1, 0.6, 0)]
        [0, 4, 10]
    """
    return round((1 - t) * (n_steps - 1))


def in_stage(stage: tuple[float, float], t: float) -> bool:
    """Whether t lies in a stage, above its start and up to its stop; 0 belongs to what starts at 0.

    Example:
        >>> in_stage((0.6, 1.0), 0.6), in_stage((0.2, 0.6), 0.6), in_stage((0.0, 0.2), 0.0)
        (False, True, True)
    """
    start, stop = stage
    return start < t <= stop or t == start == 0


def check_stage(stage: tuple[float, float]) -> tuple[float, float]:
    """The stage as two floats.

    Raises:
        ValueError: if it is not (start, stop) with 0 <= start < stop <= 1.
    """
    start, stop = map(float, stage)
    if not 0 <= start < stop <= 1:
        raise ValueError(f"a stage is (start, stop) in t with 0 <= start < stop <= 1, got {(start, stop)}")
    return start, stop


def find_site(pipe: DiffusionPipeline, name: str) -> Site:
    """The site of the denoiser that a place names.

    Raises:
        KeyError: if there is none.

    Example:
        >>> import mediation
        >>> find_site(mediation.load_pipeline(), "unet.mid.0").path
        'mid_block.attentions.0'
    """
    network = family_of(pipe).denoiser
    transformers = sites(pipe, network=network, component="transformer")
    every = {site.name: site for site in (*transformers, *sites(pipe, network=network))}
    for candidate in (name, f"{name}.transformer"):
        if candidate in every:
            return every[candidate]
    known = ", ".join(site.name.removesuffix(".transformer") for site in transformers)
    raise KeyError(f"{name!r} is no site whose activations can be read; the transformers are {known}")


def moment_at(pipe: DiffusionPipeline, timestep: torch.Tensor | float) -> Moment:
    """The moment at which the pipeline that is sampling calls its denoiser with this timestep.

    Raises:
        ValueError: if the scheduler does not visit it.
    """
    known = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))
    now = torch.as_tensor(timestep).flatten()[0].item()
    if now not in known:
        raise ValueError(f"the denoiser ran at timestep {now}, which the scheduler does not visit: call the pipeline")
    halves = family_of(pipe).guidance_halves if pipe.do_classifier_free_guidance else ("cond",)
    return Moment(known.index(now), len(known), tuple(halves))


@contextlib.contextmanager
def visiting(pipe: DiffusionPipeline, visits: Sequence[tuple[Place, Visit]]) -> Iterator[None]:
    """Shows activations to functions, and adds what they return, whenever the denoiser runs inside.

    Args:
        pipe: the pipeline.
        visits: places, of which only the site and what is read of it count here, and functions.

    Raises:
        KeyError: if a place's site is unknown.
        RuntimeError: at the end, if a site ran less often than the denoiser, so that something was skipped.
    """
    call = _Call(pipe)
    visitors, outputs, inputs = [], [], []
    for place, visit in visits:
        site = find_site(pipe, place.site)
        visitor = _Visitor(call, site, visit, place.reads)
        visitors.append(visitor)
        outputs.append((site.module(pipe), visitor.change))
        inputs.append((site.module(pipe), visitor.keep))
    with announced(getattr(pipe, family_of(pipe).denoiser), call.begin), hooked(outputs, inputs=inputs):
        yield
    for visitor in visitors:
        if visitor.n_runs != call.n_runs:
            raise RuntimeError(
                f"{visitor.site.name} ran {visitor.n_runs} times while the denoiser ran {call.n_runs} times: turn off"
                " whatever caches or compiles parts of this pipeline"
            )


class _Call:
    """The present call of the denoiser."""

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe = pipe
        self.n_runs = 0
        self.moment: Moment | None = None
        self.size: tuple[int, int] = (1, 1)

    def begin(self, sample: torch.Tensor, timestep: torch.Tensor | float, *_arguments, **_options) -> None:
        self.moment, self.size = moment_at(self._pipe, timestep), tuple(sample.shape[-2:])
        self.n_runs += 1


class _Visitor:
    """Keeps what a module receives until it has its output, and brings activations into one layout and back."""

    def __init__(self, call: _Call, site: Site, visit: Visit, reads: str):
        self.site, self.n_runs = site, 0
        self._call, self._visit = call, visit
        self._subtracts = reads == "update" and site.component == "transformer"
        self._given: torch.Tensor | None = None

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._given = tensor if self._subtracts else None
        return tensor

    def change(self, output: torch.Tensor) -> torch.Tensor:
        self.n_runs += 1
        values = output.to(torch.promote_types(output.dtype, torch.float32))
        if self._subtracts:
            values, self._given = values - self._given, None
        moment = self._call.moment
        added = self._visit(moment, self._as_grid(values).unflatten(0, (len(moment.halves), -1)))
        if added is None:
            return output
        added = added.flatten(0, 1)
        added = added.permute(0, 3, 1, 2) if output.ndim == 4 else added.flatten(1, 2)
        return output + added.to(output)

    def _as_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Activations (row, channel, y, x) or (row, token, feature) as (row, y, x, feature)."""
        if values.ndim == 4:
            return values.permute(0, 2, 3, 1)
        height, width = self._call.size
        return values.unflatten(1, (round(math.sqrt(values.shape[1] * height / width)), -1))
