"""One call of the pipeline with every run of an experiment as a row.

All rows share the starting latent and, with stochastic samplers, the noise of every step. The pipeline's own
`__call__` is the sampler.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from mediation.cases import Case
from mediation.encoding import encode_rows
from mediation.hooks import represented
from mediation.interventions import Copy
from mediation.pipelines import family_of, quiet
from mediation.rows import N_CONTROLS, Intervention, Target, intervening
from mediation.waiting import Waiting, treats_rows_alike


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled, the same for every row.

    Attributes:
        num_inference_steps: steps of the pipeline's scheduler.
        guidance_scale: classifier-free guidance; at 1 or below there is no unconditional half.
        branch: the half of the denoiser's batch that is changed: "cond", "uncond" or "both".
    """

    num_inference_steps: int = 25
    guidance_scale: float = 7.5
    branch: str = "cond"

    def __post_init__(self):
        if self.branch not in ("cond", "uncond", "both"):
            raise ValueError(f'branch must be "cond", "uncond" or "both", got {self.branch!r}')
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if self.branch != "cond" and not self.guided:
            raise ValueError(f"at guidance_scale={self.guidance_scale} there is no unconditional branch to restore")

    @property
    def guided(self) -> bool:
        """Whether the denoiser sees an unconditional half."""
        return self.guidance_scale > 1

    def present_halves(self, halves: Sequence[str]) -> Sequence[str]:
        """Which halves the denoiser's batch has, of those that a family names in their order."""
        return halves if self.guided else ("cond",)

    def changed_halves(self, halves: Sequence[str]) -> list[int]:
        """The places of those that are changed, among `present_halves`."""
        return [i for i, half in enumerate(self.present_halves(halves)) if self.branch in (half, "both")]


@torch.no_grad()
def sample_rows(
    pipe: DiffusionPipeline,
    case: Case,
    draw: int,
    rows: Sequence[Intervention],
    sampling: Sampling,
    *,
    progress: "Progress | None" = None,
) -> torch.Tensor:
    """Samples the clean row, the corrupted row, and one row per intervention.

    The denoiser computes a row from the step on in which it is first changed; until then it is the run it starts as. In
    that step it still shares the half that is not changed, unless hooks of others are there to see unequal halves.

    Args:
        pipe: the pipeline.
        case: what is sampled.
        draw: which draw of its corruption.
        rows: what happens in the rows behind the controls.
        sampling: how.
        progress: kept up to date, for whoever else has to know whether a window is open.

    Returns:
        Final latents, (row, channel, height, width): row 0 is the clean run, row 1 the corrupted run, both untouched.
    """
    family = family_of(pipe)
    n_rows = N_CONTROLS + len(rows)
    conditioning = encode_rows(pipe, case, draw, rows)
    progress = progress or Progress(pipe)
    denoiser = getattr(pipe, family.denoiser)
    halves, changed = (find(family.guidance_halves) for find in (sampling.present_halves, sampling.changed_halves))
    waiting = Waiting(rows, family.denoiser, halves, changed, equal_halves=not treats_rows_alike(denoiser))

    def copies(target: Target, features: slice) -> list[Copy]:
        if not target.intervention.covers(progress.fraction):
            return []
        involved = target.intervention.donor, target.row
        return [Copy(*waiting.places(half, involved), features=features) for half in changed]

    def stand_ins(latents: torch.Tensor) -> list[int]:
        return waiting.stand_ins(latents, progress.fraction)

    with represented(denoiser, stand_ins), intervening(pipe, rows, [family.denoiser], copies):
        latents = starting_latents(pipe, case, n_rows)
        return denoise(pipe, case, conditioning, latents, sampling, on_step_end=progress.advance)


def sample_alone(
    pipe: DiffusionPipeline, case: Case, conditioning: Mapping[str, torch.Tensor], run: int, sampling: Sampling
) -> torch.Tensor:
    """Samples the clean or the corrupted run without the other.

    Args:
        pipe: the pipeline.
        case: what is sampled.
        conditioning: of both runs, as of `encode_rows`.
        run: `rows.CLEAN` or `rows.CORRUPTED`.
        sampling: how.

    Returns:
        Final latents, (1, channel, height, width).
    """
    own = {keyword: value[[run]] for keyword, value in conditioning.items()}
    return denoise(pipe, case, own, starting_latents(pipe, case, 1), sampling)


def starting_latents(pipe: DiffusionPipeline, case: Case, n_rows: int) -> torch.Tensor:
    """The latents that every run of a case starts from, (row, channel, height, width)."""
    family = family_of(pipe)
    noise = torch.randn((1, *family.latent_shape(pipe)), generator=torch.Generator().manual_seed(case.seed))
    return noise.expand(n_rows, -1, -1, -1).to(pipe._execution_device, getattr(pipe, family.denoiser).dtype)


def denoise(
    pipe: DiffusionPipeline,
    case: Case,
    conditioning: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    sampling: Sampling,
    *,
    on_step_end: Callable | None = None,
) -> torch.Tensor:
    """Runs the pipeline's own loop; gradients are recorded if the caller records any.

    Args:
        pipe: the pipeline.
        case: whose seed the noise of stochastic samplers comes from.
        conditioning: what the denoiser reads of the prompts, as the family's `encode` returns it.
        latents: to start from, (row, channel, height, width).
        sampling: how to sample.
        on_step_end: passed to the pipeline as `callback_on_step_end`.

    Returns:
        Final latents, of the shape of `latents`.
    """
    conditioning, n_rows = dict(conditioning), len(latents)
    if sampling.guided:
        with torch.no_grad():
            for name, value in family_of(pipe).encode_negative(pipe).items():
                conditioning[name] = value.expand(n_rows, *value.shape[1:])
    # diffusers decorates the call with torch.no_grad; the function beneath is the same loop
    call = inspect.unwrap(type(pipe).__call__)
    with quiet(pipe):
        output = call(
            pipe,
            **conditioning,
            latents=latents,
            generator=[torch.Generator().manual_seed(case.seed + 1) for _ in range(n_rows)],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="latent",
            callback_on_step_end=on_step_end,
        )
    return output.images


def n_iterations(pipe: DiffusionPipeline, num_inference_steps: int) -> int:
    """How often the pipeline's loop runs for this many steps: some schedulers take several iterations for a step.

    Example:
        >>> import diffusers, mediation
        >>> pipe = mediation.load_pipeline()
        >>> pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        >>> n_iterations(pipe, 10)
        11
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps)


class Progress:
    """How much of sampling is done, told by the pipeline itself: denoiser calls are not steps."""

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe, self._n_done = pipe, 0

    @property
    def fraction(self) -> float:
        """The share that is done, as windows count it: of the iterations of the pipeline's loop."""
        return self._n_done / self._pipe.num_timesteps

    def advance(self, _pipe, index: int, _timestep, tensors: dict) -> dict:
        """What the pipeline calls at the end of each iteration."""
        self._n_done = index + 1
        return tensors
