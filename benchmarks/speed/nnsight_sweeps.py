"""The sweep of `sweeps` as nnsight's documentation writes such sweeps, for nnsight 0.8.

Sources: docs/models/diffusion-model.md and docs/patterns/activation-patching.md of nnsight 0.8.1. The latter shows two
ways, and both are here: one trace per site, and the clean run's activations cached, so that patched rows are batched.
nnsight is no requirement of this project.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

import numpy
import torch
from diffusers import DiffusionPipeline

from benchmarks.speed.sweeps import Sweep, score
from mediation.encoding import encode_rows
from mediation.pipelines import family_of


def is_installed() -> bool:
    """Whether nnsight can be imported."""
    return importlib.util.find_spec("nnsight") is not None


def wrap(pipe: DiffusionPipeline, folder: pathlib.Path):
    """The same pipeline as a model of nnsight, by way of a folder, since nnsight loads pipelines itself."""
    import nnsight

    pipe.save_pretrained(folder)
    model = nnsight.DiffusionModel(str(folder), dispatch=True)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def one_trace_per_site(sweep: Sweep, model) -> numpy.ndarray:
    """For each site, a clean and a corrupted invoke that meet at a barrier, in every step."""
    clean, corrupted = _embeddings(sweep)
    n_calls, options = _options(sweep, model, 2)
    scores = []
    for site in sweep.sites:
        module = model.get(f"unet.{site.path}")
        with model.generate(**options) as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(prompt_embeds=clean):
                for _ in tracer.iter[:n_calls]:
                    state = module.output
                    barrier()
            with tracer.invoke(prompt_embeds=corrupted):
                for _ in tracer.iter[:n_calls]:
                    barrier()
                    module.output = _with_conditional_half(module.output, state)
            with tracer.invoke():
                result = tracer.result.save()
        scores.append(score(sweep, result.images)[-1])
    return numpy.array(scores)


def cached(sweep: Sweep, model, batch_size: int) -> numpy.ndarray:
    """The clean run's outputs of all sites at all steps are kept; then rows that read them share traces.

    Args:
        sweep: the sweep.
        model: from `wrap`.
        batch_size: rows of one trace.
    """
    import nnsight

    clean, corrupted = _embeddings(sweep)
    n_calls, options = _options(sweep, model, 1)
    modules = [model.get(f"unet.{site.path}") for site in sweep.sites]
    with model.generate(prompt_embeds=clean, **options) as tracer:
        states = nnsight.save([])
        for _ in tracer.iter[:n_calls]:
            states.append([module.output for module in modules])
        result = tracer.result.save()
    clean_latents = result.images
    scores = []
    for start in range(0, len(modules), batch_size):
        chunk = modules[start : start + batch_size]
        _, options = _options(sweep, model, len(chunk))
        with model.generate(**options) as tracer:
            for i in range(len(chunk)):
                with tracer.invoke(prompt_embeds=corrupted):
                    for step in tracer.iter[:n_calls]:
                        chunk[i].output = _with_conditional_half(chunk[i].output, states[step][start + i])
            with tracer.invoke():
                result = tracer.result.save()
        scores.extend(score(sweep, torch.cat([clean_latents, result.images]))[1:])
    return numpy.array(scores)


def _with_conditional_half(rows: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """An invoke's two rows, unconditional and conditional, with the latter from the clean run."""
    return torch.cat([rows[:1], clean[1:]])


def _embeddings(sweep: Sweep) -> Sequence[torch.Tensor]:
    """What the denoiser reads of the clean and of the corrupted prompt."""
    return encode_rows(sweep.pipe, sweep.case, 0, [])["prompt_embeds"].split(1)


def _options(sweep: Sweep, model, n_rows: int) -> tuple[int, dict]:
    """Calls of the denoiser, and the pipeline's keyword arguments for this many rows."""
    model.pipeline.scheduler.set_timesteps(sweep.sampling.num_inference_steps)
    generator = torch.Generator().manual_seed(sweep.case.seed)
    noise = torch.randn((1, *family_of(sweep.pipe).latent_shape(sweep.pipe)), generator=generator)
    options = {
        "latents": noise.expand(n_rows, -1, -1, -1),
        "num_inference_steps": sweep.sampling.num_inference_steps,
        "guidance_scale": sweep.sampling.guidance_scale,
        "output_type": "latent",
    }
    return len(model.pipeline.scheduler.timesteps), options
