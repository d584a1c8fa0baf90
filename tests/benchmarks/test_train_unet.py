import types

import pytest
import torch

from benchmarks.emoji import world
from benchmarks.emoji.latents import SMALLEST_VARIANCE, UNSAID, Whitening, scheduler
from benchmarks.emoji.train_critic import Critic
from benchmarks.emoji.train_unet import HIGHEST_NOISE, TIMESTEP_POWER, build, denoise, misread, optimizers


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


ALPHAS = scheduler().alphas_cumprod


def test_a_denoiser_that_knows_the_latents_predicts_them_and_has_no_loss():
    torch.manual_seed(0)
    latents, text = torch.randn(8, 4, 16, 16), torch.randn(8, 32, 192)
    seen = {}

    def knowing(noisy, timesteps, states):
        alpha = ALPHAS[timesteps][:, None, None, None]
        seen.update(timesteps=timesteps, states=states)
        return types.SimpleNamespace(sample=(noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt())

    loss, clean, timesteps = denoise(knowing, ALPHAS, latents, text)
    assert loss < 1e-8
    torch.testing.assert_close(clean, latents, atol=1e-3, rtol=0)
    assert torch.equal(timesteps, seen["timesteps"])
    assert seen["states"] is text
    # one timestep of every stratum
    assert ((timesteps / 1000) ** (1 / TIMESTEP_POWER) * 8 + 1e-2).long().sort().values.tolist() == list(range(8))


def test_the_loss_weighs_noise_as_the_picture_it_makes():
    latents, text = torch.zeros(512, 4, 2, 2), torch.zeros(512, 1, 1)

    def wrong(noisy, timesteps, states):
        noise = noisy / (1 - ALPHAS[timesteps]).sqrt()[:, None, None, None]
        return types.SimpleNamespace(sample=noise + 1)

    torch.manual_seed(0)
    loss, _, timesteps = denoise(wrong, ALPHAS, latents, text)
    snr = (ALPHAS / (1 - ALPHAS))[timesteps]
    expected = torch.minimum(snr + 1, torch.tensor(5.0)) / torch.maximum(snr, torch.tensor(0.03))
    torch.testing.assert_close(loss, expected.mean())


def test_the_critic_teaches_what_is_said_and_nothing_else():
    torch.manual_seed(0)
    critic = Critic((8, 8, 8)).eval()
    latents = torch.randn(6, 4, 16, 16, requires_grad=True)
    said = torch.full((6, len(world.FACTORS)), UNSAID)
    assert misread(critic, ALPHAS, latents, said) == 0
    said[2, list(world.FACTORS).index("style")] = 3
    said[:, list(world.FACTORS).index("background")] = 1  # which it does not read
    misread(critic, ALPHAS, latents, said).backward()
    assert [bool(gradient.any()) for gradient in latents.grad] == [False, False, True, False, False, False]


def test_the_critic_reads_latents_under_new_noise():
    read = {}

    def critic(latents, timesteps):
        read.update(latents=latents, timesteps=timesteps)
        return {"style": torch.zeros(len(latents), 5)}

    torch.manual_seed(0)
    said = torch.zeros(256, len(world.FACTORS), dtype=torch.long)
    loss = misread(critic, ALPHAS, torch.ones(256, 4, 16, 16), said)
    torch.testing.assert_close(loss, 256 * torch.tensor(5.0).log())
    assert read["timesteps"].max() < HIGHEST_NOISE
    alpha = ALPHAS[read["timesteps"]]
    torch.testing.assert_close(read["latents"].mean((1, 2, 3)), alpha.sqrt(), atol=0.15, rtol=0)
    torch.testing.assert_close(read["latents"].var((1, 2, 3)), 1 - alpha, atol=0.15, rtol=0)
