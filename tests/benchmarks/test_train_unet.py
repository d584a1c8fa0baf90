import collections

import numpy
import pytest
import torch

from benchmarks.emoji import world
from benchmarks.emoji.train_unet import LEARNED_EARLY, SMALLEST_VARIANCE, Whitening, build, optimizers, sample


@pytest.fixture(scope="module")
def states():
    """Text states of which a few directions hold nearly all variance, as those of a text encoder do."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -0.5, 192)
    basis = torch.linalg.qr(torch.randn(192, 192, generator=generator)).Q
    return torch.randn(4000, 192, generator=generator) * spread @ basis + 3 * basis[0]


def test_whitening_centres_and_divides_variances_by_themselves_and_a_small_part_of_their_sum(states):
    before = torch.linalg.eigvalsh(torch.cov(states.T).double())
    whitened = Whitening(states)(states)
    after = torch.linalg.eigvalsh(torch.cov(whitened.T).double())
    assert whitened.mean(0).abs().max() < 1e-4
    expected = before / (before + SMALLEST_VARIANCE * before.sum())
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-3)
    assert before[-1] / before[96] > 10
    assert after[-1] / after[96] < 1.5


@torch.no_grad()
def test_the_denoiser_predicts_the_same_from_whitened_states_and_after_folding_from_plain_ones(states):
    torch.manual_seed(0)
    unet, whitening = build().eval(), Whitening(states)
    plain = states[: 2 * 32].unflatten(0, (2, 32))
    latents = torch.randn(2, 4, 16, 16)
    expected = unet(latents, 500, plain).sample
    unfolded = whitening.unfold(unet)
    torch.testing.assert_close(unfolded(latents, 500, whitening(plain)).sample, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whitening.fold(unfolded)(latents, 500, plain).sample, expected, atol=1e-5, rtol=1e-4)
    # the two read their states differently, so that nothing of this is trivial
    assert (unfolded(latents, 500, plain).sample - expected).abs().max() > 1e-3


def test_every_weight_is_optimised_once():
    torch.manual_seed(0)
    unet = build()
    both = optimizers(unet, lr=1e-3)
    given = [p for optimizer in both.values() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(p.data_ptr() for p in given) == sorted(p.data_ptr() for p in unet.parameters())

    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    text = torch.randn(2, 32, 192)
    unet(torch.randn(2, 4, 16, 16), 500, text).sample.square().sum().backward()
    for optimizer in both.values():
        optimizer.step()
    still = [name for name, weight in unet.named_parameters() if torch.equal(weight, before[name])]
    assert not still


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
