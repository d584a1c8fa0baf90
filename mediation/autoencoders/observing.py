"""Observing: a pipeline draws prompts, and what its sites compute at chosen steps is handed on, chunk by chunk."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from mediation.autoencoders.places import Moment, Place, Visit, find_site, moment_at, nearest_step, visiting
from mediation.guards import check_traceable
from mediation.pipelines import family_of, quiet
from mediation.sampling import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """Some prompts, drawn together.

    Attributes:
        prompts: one per row.
        seeds: of the starting latents, likewise.
        activations: by place, (row, step, y, x, feature), float32 on the CPU.
        images: (row, 3, height, width) in [0, 1], or None if they were not asked for.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    activations: Mapping[Place, torch.Tensor]
    images: torch.Tensor | None


def observe(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    places: Sequence[Place],
    *,
    sampling: Sampling,
    with_images: bool = False,
    batch_size: int | None = None,
) -> Iterator[Observation]:
    """Draws prompts, and keeps the activations of one chunk of rows at a time.

    Without images, sampling ends at the last step that a place asks for.

    Args:
        pipe: the pipeline.
        prompts: one per row.
        seeds: one per prompt.
        places: what to keep.
        sampling: how to sample; its branch does not matter.
        with_images: whether sampling goes on to images.
        batch_size: rows of one call of the pipeline; None suits the latents' size.

    Raises:
        KeyError, ValueError: at once, if an argument does not fit the pipeline.

    Example:
        >>> import mediation
        >>> pipe, place = mediation.load_pipeline(), Place("unet.mid.0")
        >>> found = next(observe(pipe, ["a cat", "a dog"], [0, 1], [place], sampling=Sampling(2)))
        >>> found.activations[place].shape
        torch.Size([2, 1, 4, 4, 192])
    """
    check_traceable(pipe)
    prompts, seeds = check_prompts(prompts), [int(seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise ValueError(f"there is one seed for each prompt; got {len(prompts)} prompts and {len(seeds)} seeds")
    for place in places:
        find_site(pipe, place.site)
        if place.branch == "uncond" and not sampling.guided:
            raise ValueError(f"at guidance_scale={sampling.guidance_scale} there is no unconditional branch to read")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = batch_size or rows_that_fit(pipe)
    chunks = [slice(start, start + size) for start in range(0, len(prompts), size)]
    return (_observe(pipe, prompts[rows], seeds[rows], tuple(places), sampling, with_images) for rows in chunks)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        TypeError: if they are a single string, or hold something else.
        ValueError: if there are none.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, got {prompts!r}"[:200])
    if not len(prompts):
        raise ValueError("no prompts were given: pass at least one")
    return list(prompts)


def rows_that_fit(pipe: DiffusionPipeline) -> int:
    """Rows of one call with as much activation memory as 32 rows of 32×32 latents, within reason."""
    _, height, width = family_of(pipe).latent_shape(pipe)
    return max(1, min(32, 32 * 32 * 32 // (height * width)))


@torch.no_grad()
def _observe(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    places: tuple[Place, ...],
    sampling: Sampling,
    with_images: bool,
) -> Observation:
    family, n_rows = family_of(pipe), len(prompts)
    found: dict[Place, dict[int, torch.Tensor]] = {place: {} for place in places}
    n_steps = 0

    def keeping(place: Place) -> Visit:
        def keep(moment: Moment, activations: torch.Tensor) -> None:
            if moment.index in {nearest_step(t, moment.n_steps) for t in place.steps}:
                half = activations[moment.halves.index(place.branch)]
                # a copy, which does not hold on to the tensor of both halves
                kept = half.to("cpu", torch.float32, copy=True).contiguous()
                found[place].setdefault(moment.index, kept)

        return keep

    def advance(_pipe, _index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal n_steps
        moment = moment_at(pipe, timestep)
        n_steps = moment.n_steps
        last = max((nearest_step(t, n_steps) for place in places for t in place.steps), default=0)
        if moment.index >= last and not with_images:
            pipe._interrupt = True  # as diffusers documents it; the next call of the pipeline takes it back
        return tensors

    conditioning = family.encode(pipe, prompts) | (family.encode_negative(pipe) if sampling.guided else {})
    shape = (1, *family.latent_shape(pipe))
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with quiet(pipe), visiting(pipe, [(place, keeping(place)) for place in places]):
        latents = pipe(
            **{keyword: value.expand(n_rows, *value.shape[1:]) for keyword, value in conditioning.items()},
            latents=noise.to(pipe._execution_device, getattr(pipe, family.denoiser).dtype),
            generator=[torch.Generator().manual_seed(seed + 1) for seed in seeds],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="latent",
            callback_on_step_end=advance,
        ).images
    activations = {
        place: torch.stack([steps[nearest_step(t, n_steps)] for t in place.steps], dim=1)
        for place, steps in found.items()
    }
    images = family.decode(pipe, latents).float().cpu() if with_images else None
    return Observation(tuple(prompts), tuple(seeds), activations, images)
