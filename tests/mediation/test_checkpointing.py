"""Gradient checkpointing, which trained pipelines may have on: results are as without it, and it stays on."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mediation
from mediation import Case, LatentDistance
from tests import tiny

CASE = Case("a photo of a cat in ink style", subject="cat")
FAST = {"num_inference_steps": 2, "progress": False}
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


def estimate(pipe, network):
    options = {"sites": mediation.sites(pipe, network=network), "metric": LatentDistance(), **FAST}
    return mediation.trace(pipe, CASE, backend="attribution_patching", **options).restored.values


def scores(pipe, network):
    found = mediation.attribute(pipe, "a ink cat", parameters=f"{network}.*", **FAST).scores
    return torch.cat([score.flatten() for score in found.values()]).numpy()


@functools.cache
def without(measure, network):
    return measure(tiny.shallow(), network)


def switched(network):
    return [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]


def check(network, reentrant):
    """Switches it on, as the methods of diffusers and transformers do."""
    network.train()  # without which transformers ignores it
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)


@pytest.mark.parametrize("measure", [estimate, scores])
@pytest.mark.parametrize(("network", "reentrant"), [("unet", False), ("text_encoder", False), ("text_encoder", True)])
def test_results_are_as_without_checkpointing(measure, network, reentrant):
    expected = without(measure, network)
    assert expected.any()
    pipe = tiny.shallow()
    check(getattr(pipe, network), reentrant)
    on = switched(getattr(pipe, network))
    assert on
    assert measure(pipe, network) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert switched(getattr(pipe, network)) == on


def test_it_is_on_again_after_an_error():
    pipe = tiny.shallow()
    pipe.unet.enable_gradient_checkpointing()
    on, seen = switched(pipe.unet), []

    def fail(images, latents, cases):
        seen.append(len(switched(pipe.unet)))
        if len(seen) > 1:  # once before any work
            raise ArithmeticError
        return latents.mean((1, 2, 3))

    with pytest.raises(ArithmeticError):
        mediation.trace(pipe, CASE, metric=fail, sites=["unet.mid.0.resnet"], backend="attribution_patching", **FAST)
    assert seen == [len(on), 0]
    assert switched(pipe.unet) == on
