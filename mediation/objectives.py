"""What component attribution differentiates: how far the denoiser's predictions for a prompt lie from fixed targets.

The denoiser is asked at noisy latents x_t, each with the t that it belongs to. Latents and targets stay as they are
when weights change, so an objective can be compared between a pipeline and its edits.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy
import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from mediation.adjoint import frozen
from mediation.hooks import announced
from mediation.parameters import locate
from mediation.pipelines import family_of, quiet
from mediation.sampling import Sampling

_N_ATTEMPTS = 6  # at finding a scale at which gradients are finite


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """J(w) = sign · mean over rows of ||target − prediction of w (x_t, prompt, t)||².

    Attributes:
        prompt: what the denoiser reads.
        sign: 1 or −1.
        latents: x_t, scaled as the denoiser reads it, (row, channel, height, width).
        timesteps: t, (row,).
        targets: (row, channel, height, width).
    """

    prompt: str
    sign: int
    latents: torch.Tensor
    timesteps: torch.Tensor
    targets: torch.Tensor

    @torch.no_grad()
    def value(self, pipe: DiffusionPipeline, *, batch_size: int = 16) -> float:
        """J with the pipeline's present weights."""
        conditioning = family_of(pipe).encode(pipe, [self.prompt])
        chunks = _chunks(len(self.latents), batch_size)
        return self._scale * sum(float(self._misses(pipe, conditioning, rows)[1].square().sum()) for rows in chunks)

    def gradients(
        self, pipe: DiffusionPipeline, names: Iterable[str], *, batch_size: int = 16, progress: bool = True
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """J, and dJ/dw of the named parameters in their shapes, summed in float32 whatever the pipeline's dtype.

        Raises:
            ValueError: if gradients are not finite.
        """
        family = family_of(pipe)
        parameters = {name: getattr(*locate(pipe, name)) for name in names}
        inner = {name: p for name, p in parameters.items() if name.startswith(f"{family.denoiser}.")}
        outer = {name: p for name, p in parameters.items() if name not in inner}
        sums = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
        squares = 0.0
        bar = tqdm(total=len(self.latents), desc="attributing", unit="row", disable=None if progress else True)
        with bar, torch.enable_grad(), _tracking(pipe, list(parameters.values())):
            # Text encoders run once: what reaches their outputs is summed over rows, and goes back through them last.
            encoded = family.encode(pipe, [self.prompt])
            doors = {keyword: states.detach().requires_grad_(bool(outer)) for keyword, states in encoded.items()}
            read = list(doors.values()) if outer else []
            at_doors = [torch.zeros(states.shape, device=states.device) for states in read]
            for rows in _chunks(len(self.latents), batch_size):
                prediction, misses = self._misses(pipe, doors, rows)
                found = _pull_back([prediction], [-2 * self._scale * misses], [*inner.values(), *read])
                del prediction  # and its graph, before the next one is built
                for total, gradient in zip([*(sums[name] for name in inner), *at_doors], found, strict=True):
                    total += gradient
                squares += float(misses.square().sum())
                bar.update(len(misses))
            if outer:
                found = _pull_back(list(encoded.values()), at_doors, list(outer.values()))
                sums |= dict(zip(outer, found, strict=True))
        return self._scale * squares, {name: gradient.cpu() for name, gradient in sums.items()}

    @property
    def _scale(self) -> float:
        return self.sign / len(self.latents)

    def _misses(self, pipe, conditioning: dict[str, torch.Tensor], rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser predicts of some rows; and, in float32 at least, how much the targets exceed it."""
        prediction = _predict(pipe, conditioning, self.latents[rows], self.timesteps[rows])
        wide = torch.promote_types(prediction.dtype, torch.float32)
        return prediction, self.targets[rows].to(prediction.device, wide) - prediction.detach().to(wide)


@torch.no_grad()
def erase_objective(
    pipe: DiffusionPipeline,
    concept: str,
    base: str,
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    progress: bool,
) -> Objective:
    """J = E ||prediction(x_t, base, t) − prediction(x_t, concept, t)||², along trajectories that draw the concept.

    The first prediction is held fixed. One trajectory from each seed gives an x_t for every step.
    """
    latents, timesteps, _ = _draw(pipe, concept, seeds, sampling, batch_size, progress)
    conditioning = family_of(pipe).encode(pipe, [base])
    chunks = _chunks(len(latents), batch_size)
    targets = torch.cat([_predict(pipe, conditioning, latents[rows], timesteps[rows]) for rows in chunks])
    return Objective(concept, 1, latents, timesteps, targets)


@torch.no_grad()
def amplify_objective(
    pipe: DiffusionPipeline,
    concept: str,
    images: torch.Tensor | None,
    *,
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    progress: bool,
) -> Objective:
    """J = −E ||noise − prediction(x_t, concept, t)||² on images of the concept, noised to t.

    Where the denoiser predicts something else than the noise, that takes the noise's place. The t are the middles of
    as many equal parts of the training steps as there are steps of sampling.

    Args:
        pipe: the pipeline.
        concept: what the images show.
        images: pixels in [-1, 1], (image, 3, height, width); each is noised from every seed. None draws an image from
            each seed, and noises it once. Noise depends on the seed and the image's place alone, whatever the others.
        seeds: of trajectories and noise.
        sampling: of the trajectories.
        batch_size: rows that run together.
        progress: whether to show a progress bar.
    """
    family, scheduler = family_of(pipe), pipe.scheduler
    if images is None:
        clean = _draw(pipe, concept, seeds, sampling, batch_size, progress)[2]
        noised = [(image, seed, 0) for image, seed in zip(clean, seeds, strict=True)]
    else:
        chunks = _chunks(len(images), batch_size)
        clean = torch.cat([family.encode_images(pipe, images[rows].to(pipe._execution_device)) for rows in chunks])
        noised = [(image, seed, place) for seed in seeds for place, image in enumerate(clean)]
    n_steps, n_trained = sampling.num_inference_steps, len(scheduler.alphas_cumprod)
    times = torch.tensor([int((i + 0.5) * n_trained / n_steps) for i in range(n_steps)])
    share = scheduler.alphas_cumprod.cpu().float()[times].view(-1, 1, 1, 1)
    latents, targets = [], []
    for image, seed, place in noised:
        noise = torch.randn((n_steps, *image.shape), generator=_generator(seed, place))
        image = image.float().cpu()
        latents.append(share.sqrt() * image + (1 - share).sqrt() * noise)
        velocity = share.sqrt() * noise - (1 - share).sqrt() * image
        target = {"epsilon": noise, "v_prediction": velocity, "sample": image.expand_as(noise)}
        targets.append(target[scheduler.config.prediction_type])
    dtype = getattr(pipe, family.denoiser).dtype
    latents = torch.cat(latents).to(pipe._execution_device, dtype)
    return Objective(concept, -1, latents, times.repeat(len(noised)).to(latents.device), torch.cat(targets))


def _draw(
    pipe: DiffusionPipeline, prompt: str, seeds: Sequence[int], sampling: Sampling, batch_size: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Trajectories that draw a prompt: all x_t as the denoiser reads them, their t, and the final latents by seed."""
    found = []
    total = len(seeds) * sampling.num_inference_steps
    with tqdm(total=total, desc="drawing", unit="step", disable=None if progress else True) as bar, quiet(pipe):
        for chunk in _chunks(len(seeds), batch_size):
            found.append(_trajectories(pipe, prompt, seeds[chunk], sampling, bar))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _trajectories(pipe, prompt: str, seeds: Sequence[int], sampling: Sampling, bar: tqdm) -> tuple[torch.Tensor, ...]:
    family, n_rows = family_of(pipe), len(seeds)
    denoiser = getattr(pipe, family.denoiser)
    halves = sampling.present_halves(family.guidance_halves)
    conditioning = family.encode(pipe, [prompt]) | (family.encode_negative(pipe) if sampling.guided else {})
    shape = (1, *family.latent_shape(pipe))
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents, timesteps = [], []

    def read(batch: torch.Tensor, *_arguments, **_options) -> None:
        latents.append(batch.chunk(len(halves))[halves.index("cond")].clone())

    def advance(_pipe, _index: int, timestep: torch.Tensor, tensors: dict) -> dict:
        timesteps.append(timestep)
        bar.update(n_rows)
        return tensors

    with announced(denoiser, read):
        final = pipe(
            **{keyword: value.expand(n_rows, *value.shape[1:]) for keyword, value in conditioning.items()},
            latents=noise.to(pipe._execution_device, denoiser.dtype),
            generator=[torch.Generator().manual_seed(seed + 1) for seed in seeds],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="latent",
            callback_on_step_end=advance,
        ).images
    if len(latents) != len(timesteps):
        raise RuntimeError(f"the denoiser ran {len(latents)} times in {len(timesteps)} steps: t of each is not known")
    return torch.cat(latents), torch.stack(timesteps).repeat_interleave(n_rows), final


def _predict(pipe, conditioning: dict[str, torch.Tensor], latents: torch.Tensor, timesteps: torch.Tensor):
    rows = {keyword: value.expand(len(latents), *value.shape[1:]) for keyword, value in conditioning.items()}
    return family_of(pipe).denoise(pipe, latents, timesteps, rows)


def _pull_back(
    outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Vector-Jacobian products in float32.

    Cotangents are brought near 1 on the way, so that half precision neither rounds small gradients to 0 nor overflows;
    a factor that is a power of two costs no digit.
    """
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    largest = max((float(cotangent.abs().max()) for _, cotangent in pairs), default=0.0)
    if largest == 0:
        return [torch.zeros(x.shape, device=x.device) for x in inputs]
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    for attempt in range(_N_ATTEMPTS):
        factor = 2.0 ** -(exponent + 3 * attempt)
        scaled = [(cotangent * factor).to(output.dtype) for output, cotangent in pairs]
        reached = [output for output, _ in pairs]
        found = torch.autograd.grad(reached, inputs, scaled, retain_graph=True, allow_unused=True)
        found = [
            torch.zeros(x.shape, device=x.device) if gradient is None else gradient.float() / factor
            for x, gradient in zip(inputs, found, strict=True)
        ]
        if all(bool(torch.isfinite(gradient).all()) for gradient in found):
            return found
    raise ValueError(f"gradients are not finite in {outputs[0].dtype}: load the pipeline in another dtype")


@contextlib.contextmanager
def _tracking(pipe: DiffusionPipeline, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Records operations on these parameters and on no others, for a while, whether they are trainable or not."""
    with frozen(pipe):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


def _generator(seed: int, place: int) -> torch.Generator:
    state = int(numpy.random.SeedSequence([seed, place]).generate_state(1)[0])
    return torch.Generator().manual_seed(state)
