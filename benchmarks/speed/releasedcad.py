"""Component attribution as its authors released it, written anew (Nguyen et al., arXiv:2412.02542).

The release draws a new trajectory from pure noise for each t: the i-th makes i guided calls of the denoiser, 1,275 in
all at 50 steps. It scores what comes out of the last call at the t that went in; here it is what went in, since
scores are compared. Only the gradients that are asked for are computed, which favours the release.
"""

from collections.abc import Mapping, Sequence

import numpy
import torch
from diffusers import DiffusionPipeline

from mediation.hooks import hooked
from mediation.parameters import locate
from mediation.pipelines import family_of, quiet


def released_scores(
    pipe: DiffusionPipeline,
    concept: str,
    names: Sequence[str],
    *,
    base: str = "",
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 3.0,
) -> dict[str, torch.Tensor]:
    """W · dJ/dw of the named parameters of the denoiser, with J as `mediation.attribute` has it for erasing.

    Args:
        pipe: the pipeline; it is only read.
        concept: a prompt.
        names: of parameters.
        base: the prompt that stands for the concept's absence.
        seed: from which every trajectory gets a seed of its own, by `trajectory_seed`.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance, above 1.
    """
    family = family_of(pipe)
    weights = [getattr(*locate(pipe, name)) for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]
    with torch.no_grad():
        conditioning, without = (family.encode(pipe, [prompt]) for prompt in (concept, base))
    for number in range(num_inference_steps):
        x, t = _visit(pipe, conditioning, number, trajectory_seed(seed, number), num_inference_steps, guidance_scale)
        with torch.no_grad():
            target = family.denoise(pipe, x, t, without)
        loss = (target - family.denoise(pipe, x, t, conditioning)).square().sum() / num_inference_steps
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient
    return {name: weight.detach() * total for name, weight, total in zip(names, weights, sums, strict=True)}


def trajectory_seed(seed: int, number: int) -> int:
    """The seed of the starting noise of one trajectory."""
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1)[0])


@torch.no_grad()
def _visit(
    pipe: DiffusionPipeline,
    conditioning: Mapping[str, torch.Tensor],
    number: int,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the denoiser reads in the call of this number, from 0, and its t (1,); later calls are left out."""
    family = family_of(pipe)
    read, times = [], []

    def keep(batch: torch.Tensor) -> torch.Tensor:
        read.append(batch.chunk(2)[family.guidance_halves.index("cond")])
        return batch

    def advance(pipe: DiffusionPipeline, index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        times.append(timestep)
        pipe._interrupt = index == number
        return tensors

    noise = torch.randn((1, *family.latent_shape(pipe)), generator=torch.Generator().manual_seed(seed))
    denoiser = getattr(pipe, family.denoiser)
    with hooked(inputs=[(denoiser, keep)]), quiet(pipe):
        pipe(
            **conditioning,
            **family.encode_negative(pipe),
            latents=noise.to(pipe._execution_device, denoiser.dtype),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            callback_on_step_end=advance,
        )
    return read[number], times[number][None]
