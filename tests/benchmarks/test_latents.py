"""Captions and noise of what the denoiser learns from."""

import collections

import numpy
import pytest
import torch

from benchmarks.emoji import world
from benchmarks.emoji.latents import LEARNED_EARLY, noised, sample, tells


def test_captions_that_are_learned_late_are_drawn_more_often_and_show_what_they_showed():
    # tolerances are some 3 standard deviations of what is counted, and far less than a wrong share would make
    rng = numpy.random.default_rng(0)
    drawn, in_world = [sample(rng) for _ in range(3000)], [world.sample(rng) for _ in range(3000)]
    stated = collections.Counter(caption.scene.style for caption in drawn if "style" in caption.said)
    assert stated["ink"] / stated["noto"] == pytest.approx(LEARNED_EARLY, abs=0.1)
    unstated = collections.Counter(caption.scene.style for caption in drawn if "style" not in caption.said)
    assert unstated["ink"] / unstated["noto"] == pytest.approx(1, abs=0.4)
    turned, turned_in_world = (sum("pose" in one.said for one in captions) for captions in (drawn, in_world))
    assert turned > 1.2 * turned_in_world


def test_captions_tell_what_they_name_and_what_has_a_default():
    rng = numpy.random.default_rng(0)
    for caption in (world.sample(rng) for _ in range(200)):
        told = {factor for factor in world.FACTORS if tells(caption, factor)}
        assert {"background", "count", "viewpoint", "pose"} <= told
        assert ("object" in told) == ("thing" not in caption.text)
        assert ("style" in told) == (caption.scene.style in caption.text.replace(",", "").split())


def test_noise_leaves_the_share_of_variance_that_is_asked_for():
    torch.manual_seed(0)
    latents, alphas = torch.full((3, 4, 64, 64), 2.0), torch.tensor([1.0, 0.5, 0.0])
    noisy, noise = noised(latents, alphas)
    torch.testing.assert_close(noisy.mean((1, 2, 3)), 2 * alphas.sqrt(), atol=0.04, rtol=0)
    torch.testing.assert_close(noisy.var((1, 2, 3)), 1 - alphas, atol=0.05, rtol=0)
    assert torch.equal(noisy[2], noise[2])
