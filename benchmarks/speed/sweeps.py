"""One sweep over sites, done in several ways that must agree: by `mediation.trace`, and site by site; and the limit.

All measure one case and one draw: the metric of the restored run, by site.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import diffusers
import numpy
import torch

import mediation
from benchmarks.speed.clip import TEXT_ENCODER
from mediation.encoding import encode_rows
from mediation.interventions import Copy
from mediation.metrics import Metric, default_metric, evaluate
from mediation.pipelines import family_of
from mediation.restoration import n_computed_rows
from mediation.rows import CLEAN, N_CONTROLS, Intervention, Target, intervening
from mediation.sampling import Sampling, denoise, starting_latents
from mediation.sites import Site
from tests import tiny

CASES = {
    "emoji": mediation.Case("a cat in the style of ink", subject="ink"),
    "sd14": mediation.Case("a photo of a cat in ink style", subject="ink"),
}
# Pictures of 128 pixels: at 512, two cores need a minute for every few rows.
_SD14_LATENTS = 16
_GUIDANCE = 4.0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Restoring each of some sites of the denoiser, in one case.

    Attributes:
        pipe: the pipeline.
        case: the case, of one draw.
        sites: the sites.
        metric: scores the runs.
        sampling: how images are sampled, with guidance.
        batch_size: rows of one call, controls included; None is `mediation.trace`'s own choice.
    """

    pipe: diffusers.DiffusionPipeline
    case: mediation.Case
    sites: tuple[Site, ...]
    metric: Metric
    sampling: Sampling
    batch_size: int | None = None


def load(name: str) -> diffusers.DiffusionPipeline:
    """The pipeline "emoji", which is bundled, or "sd14": the networks of SD 1.4 with random weights."""
    if name == "emoji":
        return mediation.load_pipeline()
    # The configurations of CompVis/stable-diffusion-v1-4, where they differ from the defaults of `tests.tiny`.
    return tiny.stable_diffusion(
        text_encoder=dict(TEXT_ENCODER),
        unet={
            "sample_size": _SD14_LATENTS,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
        },
        vae={
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "sample_size": 8 * _SD14_LATENTS,
        },
    )


def make_sweep(name: str, n_sites: int | None, steps: int) -> Sweep:
    """A sweep over the denoiser of the pipeline `name`: `n_sites`, evenly spaced in it, or all."""
    pipe = load(name)
    every = mediation.sites(pipe, network="unet")
    chosen = numpy.linspace(0, len(every) - 1, n_sites or len(every)).round().astype(int)
    sites = tuple(every[i] for i in chosen)
    return Sweep(pipe, CASES[name], sites, default_metric(pipe), Sampling(steps, _GUIDANCE))


def make_long_run(steps: int, n_sites: int) -> Callable[[], object]:
    """A sweep over the last `n_sites` of Emoji Diffusion, text encoder included, always 13 rows at a time.

    With 10 sites the sham and they fill one chunk of 11, with 40 four such chunks, each behind two control rows.
    """
    pipe = load("emoji")
    sites = tuple(mediation.sites(pipe)[-n_sites:])
    return functools.partial(
        traced, Sweep(pipe, CASES["emoji"], sites, default_metric(pipe), Sampling(steps, _GUIDANCE), 13)
    )


def traced(sweep: Sweep) -> numpy.ndarray:
    """By `mediation.trace`."""
    return _trace(sweep).restored.values[0, 0]


def triples(sweep: Sweep) -> numpy.ndarray:
    """By the reference procedure: for each site, a batch of three rows, clean, corrupted and restored."""
    return numpy.array([score(sweep, _three_rows(sweep, site))[-1] for site in sweep.sites])


@torch.no_grad()
def _three_rows(sweep: Sweep, site: Site) -> torch.Tensor:
    """Final latents of a batch of which every row is computed at every step."""
    pipe, rows, n_rows = sweep.pipe, [Intervention((site,))], N_CONTROLS + 1

    def copies(target: Target, features: slice) -> list[Copy]:
        return [Copy(n_rows + CLEAN, n_rows + target.row, features=features)]  # in the conditional half

    conditioning = encode_rows(pipe, sweep.case, 0, rows)
    latents = starting_latents(pipe, sweep.case, n_rows)
    with intervening(pipe, rows, [site.network], copies):
        return denoise(pipe, sweep.case, conditioning, latents, sweep.sampling)


@torch.no_grad()
def score(sweep: Sweep, latents: torch.Tensor) -> numpy.ndarray:
    """The metric of rows of final latents, of which row 0 is the clean run."""
    needs_images = getattr(sweep.metric, "needs_images", True)
    images = family_of(sweep.pipe).decode(sweep.pipe, latents) if needs_images else None
    return evaluate([sweep.metric], images, latents, [sweep.case] * len(latents))[0]


@contextlib.contextmanager
def counting(pipe: diffusers.DiffusionPipeline) -> Iterator[collections.Counter]:
    """Counts the rows that the U-Net evaluates, and its calls; without a hook, beside which other rows are computed."""
    counter, forward = collections.Counter(), pipe.unet.forward

    def count(latents: torch.Tensor, *arguments, **options):
        counter["rows"] += len(latents)
        counter["calls"] += 1
        return forward(latents, *arguments, **options)

    with mock.patch.object(pipe.unet, "forward", count):
        yield counter


def count_evaluations(sweep: Sweep) -> dict[str, int]:
    """Rows of `traced`, how often the U-Net evaluates one, counted, and how often it may at most.

    For n sites and chunks of `chunk` restored rows, at most n + 2 ceil(n / chunk) + chunk rows at every step, in each
    of the two halves of guidance.
    """
    with counting(sweep.pipe) as counter:
        effects = _trace(sweep)
    n_steps, batch_size = sweep.sampling.num_inference_steps, effects.attrs["batch_size"]
    n, chunk = len(sweep.sites), batch_size - N_CONTROLS
    n_rows, at_most = n_computed_rows(n, batch_size), n + 2 * math.ceil(n / chunk) + chunk
    return {
        "rows": n_rows,
        "rows_at_most": at_most,
        "evaluations": counter["rows"],
        "evaluations_at_most": 2 * n_steps * at_most,
        "chunk": chunk,
        "rows_per_call": n_rows * n_steps // counter["calls"],
    }


@torch.no_grad()
def best_batch_size(sweep: Sweep, sizes: Iterable[int]) -> int:
    """The batch size at which the bare U-Net evaluates most rows per second, the better of two calls each."""
    seconds = {}
    _evaluate_unet(sweep, 2, 2)
    for size in sizes:
        for _ in range(2):
            started = time.perf_counter()
            _evaluate_unet(sweep, size, size)
            per_row = (time.perf_counter() - started) / size
            seconds[size] = min(per_row, seconds.get(size, math.inf))
    return min(seconds, key=seconds.get)


@torch.no_grad()
def limit(sweep: Sweep, n_evaluations: int, n_rows: int, batch_size: int, n_at_once: int) -> None:
    """The least that a sweep like `traced` has to do: evaluate the U-Net, encode prompts, and score rows, as often.

    Args:
        sweep: the sweep.
        n_evaluations: rows that the U-Net evaluates, each once at one step.
        n_rows: rows that are encoded and scored.
        batch_size: of the U-Net alone.
        n_at_once: rows of one text encoding, decoding and scoring.
    """
    _evaluate_unet(sweep, n_evaluations, batch_size)
    family = family_of(sweep.pipe)
    latents = torch.zeros(1, *family.latent_shape(sweep.pipe))
    for size in _split(n_rows, n_at_once):
        family.encode(sweep.pipe, [sweep.case.prompt] * size)
        score(sweep, latents.expand(size, -1, -1, -1))


def _trace(sweep: Sweep):
    return mediation.trace(
        sweep.pipe,
        sweep.case,
        sites=sweep.sites,
        metric=sweep.metric,
        num_inference_steps=sweep.sampling.num_inference_steps,
        guidance_scale=sweep.sampling.guidance_scale,
        batch_size=sweep.batch_size,
        progress=False,
    )


def _evaluate_unet(sweep: Sweep, n_rows: int, batch_size: int) -> None:
    latents = torch.zeros(1, *family_of(sweep.pipe).latent_shape(sweep.pipe))
    text = encode_rows(sweep.pipe, sweep.case, 0, [])["prompt_embeds"][:1]
    for size in _split(n_rows, batch_size):
        rows = latents.expand(size, -1, -1, -1).contiguous()
        sweep.pipe.unet(rows, 500, encoder_hidden_states=text.expand(size, -1, -1).contiguous(), return_dict=False)


def _split(n: int, size: int) -> list[int]:
    """Sizes of the batches that n rows make."""
    return [min(size, n - start) for start in range(0, n, size)]
