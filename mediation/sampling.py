"""One call of the pipeline with every run of an experiment as a row.

All rows share the starting latent and, with stochastic samplers, the noise of every step. The pipeline's own
`__call__` is the sampler.
"""

import dataclasses
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from mediation.cases import Case
from mediation.encoding import encode_rows
from mediation.interventions import Copy
from mediation.pipelines import family_of, quiet
from mediation.rows import N_CONTROLS, Intervention, Target, intervening


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


@torch.no_grad()
def sample_rows(
    pipe: DiffusionPipeline, case: Case, draw: int, rows: Sequence[Intervention], sampling: Sampling
) -> torch.Tensor:
    """Samples the clean row, the corrupted row, and one row per intervention.

    Returns:
        Final latents, (row, channel, height, width): row 0 is the clean run, row 1 the corrupted run, both untouched.
    """
    family = family_of(pipe)
    n_rows = N_CONTROLS + len(rows)
    conditioning = encode_rows(pipe, case, draw, rows)
    if sampling.guided:
        for name, value in family.encode_negative(pipe).items():
            conditioning[name] = value.expand(n_rows, *value.shape[1:])
    noise = torch.randn((1, *family.latent_shape(pipe)), generator=torch.Generator().manual_seed(case.seed))
    dtype = getattr(pipe, family.denoiser).dtype
    latents = noise.expand(n_rows, -1, -1, -1).to(pipe._execution_device, dtype)
    progress = _Progress(pipe)
    halves = family.guidance_halves if sampling.guided else ("cond",)
    offsets = [i * n_rows for i, half in enumerate(halves) if sampling.branch in (half, "both")]

    def copies(target: Target, features: slice) -> list[Copy]:
        if not target.intervention.covers(progress.fraction):
            return []
        donor = target.intervention.donor
        return [Copy(offset + donor, offset + target.row, features=features) for offset in offsets]

    with intervening(pipe, rows, [family.denoiser], copies), quiet(pipe):
        output = pipe(
            **conditioning,
            latents=latents,
            generator=[torch.Generator().manual_seed(case.seed + 1) for _ in range(n_rows)],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="latent",
            callback_on_step_end=progress.advance,
        )
    return output.images


class _Progress:
    """How much of sampling is done, told by the pipeline itself: denoiser calls are not steps."""

    def __init__(self, pipe: DiffusionPipeline):
        self._pipe, self._n_done = pipe, 0

    @property
    def fraction(self) -> float:
        return self._n_done / self._pipe.num_timesteps

    def advance(self, _pipe, index: int, _timestep, tensors: dict) -> dict:
        self._n_done = index + 1
        return tensors
