"""Runs of a tiny pipeline, and what tests ask of them."""

import functools

import torch
import transformers

from mediation import Case
from mediation.pipelines import family_of, tokenizers_of
from mediation.sampling import Sampling
from mediation.sites import Site

CASE = Case("a photo of a cat in ink style", subject="cat", seed=3)
SAMPLING = Sampling(num_inference_steps=3, guidance_scale=4.0)


def rms(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def doors(pipe):
    """Every module through which the denoiser reads text, as sites."""
    paths = family_of(pipe).text_doors(pipe.unet)
    return tuple(Site(path, "unet", "text_door", i, "", path) for i, path in enumerate(paths))


def networks(pipe):
    return [pipe.unet, *(getattr(pipe, encoder) for encoder in tokenizers_of(pipe))]


def hooks_of(pipe):
    return [
        (module, list(module._forward_pre_hooks), list(module._forward_hooks))
        for network in networks(pipe)
        for module in network.modules()
    ]


def alone(pipe, prompt, **options):
    """What the pipeline makes of a prompt without us."""
    noise = torch.randn(1, *family_of(pipe).latent_shape(pipe), generator=torch.Generator().manual_seed(CASE.seed))
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"} | options
    return pipe(prompt, latents=noise, **options).images


def double(pipe):
    """The pipeline in float64."""
    for network in (*networks(pipe), pipe.vae):
        torch.nn.Module.double(network)
    if int(transformers.__version__.split(".")[0]) < 5:
        for name in tokenizers_of(pipe):
            encoder = getattr(pipe, name)
            encoder.forward = _with_double_constants(encoder.forward)
    return pipe


def _with_double_constants(forward):
    """transformers 4.x masks attention by the least float64 in a tensor of the default dtype, where it overflows."""

    @functools.wraps(forward)
    def wrapped(*arguments, **options):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return forward(*arguments, **options)
        finally:
            torch.set_default_dtype(before)

    return wrapped


def visited(pipe, prompt, seed, *, steps, guidance_scale):
    """What the denoiser reads on the way to a picture: x_t, t, and its prediction at each step; and final latents."""
    seen = []

    def see(_module, arguments, output):
        seen.append((arguments[0].chunk(2)[1].clone(), arguments[1], output[0].chunk(2)[1].clone()))

    noise = torch.randn(1, *family_of(pipe).latent_shape(pipe), generator=torch.Generator().manual_seed(seed))
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    handle = pipe.unet.register_forward_hook(see)
    try:
        return seen, pipe(prompt, latents=noise.to(pipe.unet.dtype), **options).images
    finally:
        handle.remove()
