"""Objectives: x_t with their own t, images noised as the schedule says, and gradients that half precision keeps."""

import math

import numpy
import pytest
import torch
from diffusers import DDIMScheduler

from mediation import attribute
from mediation.objectives import _pull_back, amplify_objective, erase_objective
from mediation.pipelines import family_of
from mediation.sampling import Sampling
from tests import tiny
from tests.runs import visited

CONCEPT, STEPS, GUIDANCE, SEED = "a ink cat", 2, 3.0, 5
OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "progress": False}
DRAWN = {"sampling": Sampling(STEPS, GUIDANCE), "batch_size": 4, "progress": False}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_denoiser_is_asked_as_the_pipeline_asks_it(family):
    pipe = tiny.FAMILIES[family]()
    steps, _ = visited(pipe, CONCEPT, SEED, steps=STEPS, guidance_scale=GUIDANCE)
    with torch.no_grad():
        conditioning = family_of(pipe).encode(pipe, [CONCEPT])
        for x, t, prediction in steps:
            again = family_of(pipe).denoise(pipe, x, t[None], conditioning)
            torch.testing.assert_close(again, prediction, rtol=0, atol=1e-5)
    found = erase_objective(pipe, CONCEPT, "", seeds=[SEED], **DRAWN)
    torch.testing.assert_close(found.latents, torch.cat([x for x, _, _ in steps]), rtol=0, atol=1e-5)
    assert found.timesteps.tolist() == [int(t) for _, t, _ in steps]


def test_latents_are_those_before_hooks_that_others_left_on_the_denoiser(tiny_pipe):
    """The hook runs again whenever the denoiser is asked; the first latents are the noise that sampling starts from."""
    noise = torch.randn(1, *family_of(tiny_pipe).latent_shape(tiny_pipe), generator=torch.Generator().manual_seed(SEED))
    with tiny_pipe.unet.register_forward_pre_hook(lambda module, given: (2 * given[0], *given[1:])):
        found = erase_objective(tiny_pipe, CONCEPT, "", seeds=[SEED], **DRAWN)
    assert torch.equal(found.latents[:1], noise)


def test_small_cotangents_survive_half_precision_and_large_sums_do_not_overflow():
    weight = torch.ones((), dtype=torch.float16, requires_grad=True)
    (small,) = _pull_back([weight * torch.full((8,), 3.0).half()], [torch.full((8,), 1e-10)], [weight])
    assert float(small) == pytest.approx(24e-10, rel=1e-3)
    (large,) = _pull_back([weight * torch.ones(200_000).half()], [torch.ones(200_000)], [weight])
    assert float(large) == pytest.approx(200_000, rel=1e-3)
    with pytest.raises(ValueError, match=r"gradients are not finite in torch.float16: load the pipeline in another"):
        _pull_back([weight * torch.ones(1).half()], [torch.tensor([math.inf])], [weight])


def shares(t):
    """The share of the image in what is noised to t, from the schedule of the tiny pipelines."""
    betas = numpy.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return numpy.cumprod(1 - betas)[t]


def test_amplifying_noises_images_to_the_middles_of_equal_parts_of_time(tiny_pipe):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = amplify_objective(tiny_pipe, CONCEPT, 2 * images - 1, seeds=[1, 2], **DRAWN)
    assert found.timesteps.tolist() == [250, 750] * 4
    with torch.no_grad():
        clean = tiny_pipe.vae.encode(2 * images - 1).latent_dist.mean * tiny_pipe.vae.config.scaling_factor
    for row, (x, t, noise) in enumerate(zip(found.latents, found.timesteps, found.targets, strict=True)):
        share = shares(int(t))
        expected = share**0.5 * clean[row // 2 % 2] + (1 - share) ** 0.5 * noise
        torch.testing.assert_close(x, expected.float(), rtol=0, atol=1e-5)
    assert 0.8 < float(found.targets.std()) < 1.2
    assert len({float(noise.sum()) for noise in found.targets}) == 8, "each row has noise of its own"
    states = tiny_pipe.encode_prompt(CONCEPT, "cpu", 1, False)[0].expand(8, -1, -1)
    with torch.no_grad():
        misses = found.targets - tiny_pipe.unet(found.latents, found.timesteps, encoder_hidden_states=states).sample
    value = -float(misses.square().sum()) / 8
    assert found.value(tiny_pipe) == pytest.approx(value, rel=1e-4)
    options = {"seeds": [1, 2], "num_inference_steps": STEPS, "progress": False}
    whole = attribute(tiny_pipe, CONCEPT, objective="amplify", images=images, **options)
    assert whole.metadata["value"] == pytest.approx(value, rel=1e-4)


def test_images_are_drawn_where_none_are_given(tiny_pipe):
    found = amplify_objective(tiny_pipe, CONCEPT, None, seeds=[SEED], **DRAWN)
    _, final = visited(tiny_pipe, CONCEPT, SEED, steps=STEPS, guidance_scale=GUIDANCE)
    for x, t, noise in zip(found.latents, found.timesteps, found.targets, strict=True):
        clean = (x - (1 - shares(int(t))) ** 0.5 * noise) / shares(int(t)) ** 0.5
        torch.testing.assert_close(clean.float(), final[0], rtol=0, atol=1e-4)


def test_a_model_that_predicts_velocity_is_compared_with_it():
    pipe = tiny.stable_diffusion_2()
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = amplify_objective(pipe, CONCEPT, 2 * images - 1, seeds=[1], **DRAWN)
    with torch.no_grad():
        clean = pipe.vae.encode(2 * images - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    share = torch.tensor(shares(found.timesteps.numpy())).view(-1, 1, 1, 1)
    # the noise, of what x_t says: x = √s x0 + √(1 − s) noise
    noise = (found.latents - share**0.5 * clean) / (1 - share) ** 0.5
    assert isinstance(pipe.scheduler, DDIMScheduler)
    velocity = pipe.scheduler.get_velocity(clean.expand_as(noise), noise.float(), found.timesteps)
    torch.testing.assert_close(found.targets, velocity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_images_are_encoded_to_what_decodes_to_them(family):
    """The decoder is random, so this is about scales: the latents are those that the VAE itself decodes."""
    statistics = {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0)}
    pipe = tiny.FAMILIES[family](vae=statistics if family == "sdxl" else {})
    pixels = 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        found = family_of(pipe).decode(pipe, family_of(pipe).encode_images(pipe, pixels))
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
