"""Tracing in half precision: what must hold, holds to within what that precision does to a run anyway."""

import copy

import numpy
import pytest
import torch

import mediation
from mediation import Case, GaussianNoise, LatentDistance
from mediation.rows import CLEAN, CORRUPTED, Intervention
from mediation.sampling import sample_rows
from tests import tiny
from tests.runs import SAMPLING, doors, networks, rms

# much noise, since of random weights little comes of the prompt, and bfloat16 has eight bits
CASE = Case("a photo of a cat in ink style", subject="cat", corruption=GaussianNoise(scale=20.0), seed=3)
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def pipes(request):
    """A pipeline in half precision, and in float32 the same one, rounded weights and all."""
    narrow = tiny.stable_diffusion()
    for network in (*networks(narrow), narrow.vae):
        torch.nn.Module.to(network, request.param)
    wide = copy.deepcopy(narrow)
    for network in (*networks(wide), wide.vae):
        torch.nn.Module.float(network)
    return narrow, wide


@pytest.fixture(scope="module")
def floor(pipes):
    """How far rounding alone takes the clean run: the distance of its final latents from those in float32."""
    narrow, wide = (sample_rows(pipe, CASE, 0, [], SAMPLING)[CLEAN] for pipe in pipes)
    return rms(narrow, wide)


def test_changing_everything_is_the_other_run_and_nothing_the_same(pipes, floor):
    rows = [Intervention(sites, mode=mode) for mode in ("restore", "knock_out") for sites in (doors(pipes[0]), ())]
    latents = sample_rows(pipes[0], CASE, 0, rows, SAMPLING)
    assert latents.dtype == pipes[0].unet.dtype
    assert rms(latents[CORRUPTED], latents[CLEAN]) > 2 * floor  # so that no run is near both
    for row, expected in enumerate((CLEAN, CORRUPTED, CORRUPTED, CLEAN), start=2):
        assert rms(latents[row], latents[expected]) <= floor


def test_maps_are_finite_and_those_of_float32_up_to_rounding(pipes, floor):
    def brightness(images, latents, cases):
        return images.float().mean((1, 2, 3))

    sites = [
        *mediation.sites(pipes[0], network="unet", component="block"),
        *mediation.sites(pipes[0], network="text_encoder", component="block"),
    ]
    found, expected = (
        mediation.trace(
            pipe, CASE, sites=sites, metric=[LatentDistance(), brightness], num_inference_steps=3, guidance_scale=4.0,
            progress=False,
        )
        for pipe in pipes
    )  # fmt: skip
    for name in ("clean", "corrupted", "sham", "restored"):
        assert numpy.isfinite(found[name]).all()
    distance, reference = (effects.sel(metric="latent_distance") for effects in (found, expected))
    assert float(abs(distance.sham - distance.corrupted).max()) <= floor
    # two runs are compared, each of which rounding moves
    assert float(abs(distance.restored - reference.restored).max()) <= 2 * floor
    assert float(abs(mediation.indirect_effect(reference)).max()) > 2 * floor
