"""Losses and their gradients against dense formulas, and the geometric median against an optimiser."""

import numpy
import pytest
import scipy.optimize
import torch

from mediation import SparseAutoencoder
from mediation.autoencoders.objective import explained_variance, geometric_median, losses

D, N, K = 6, 20, 3


@pytest.fixture
def sae(request):
    sae = SparseAutoencoder(D, N, K, activation=getattr(request, "param", "topk")).double()
    with torch.no_grad():
        random = torch.Generator().manual_seed(0)
        sae.encoder.copy_(torch.randn(N, D, generator=random, dtype=torch.float64))
        sae.bias.copy_(0.3 * torch.randn(D, generator=random, dtype=torch.float64))
        sae.scale.fill_(2.0)
    return sae


@pytest.fixture
def x():
    return 2 * torch.randn(31, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def kept(active, activation):
    """Which latents stay, (token, latent), by sorting."""
    if activation == "topk":
        order = numpy.argsort(-active, axis=1)
        mask = numpy.zeros(active.shape, bool)
        numpy.put_along_axis(mask, order[:, :K], True, 1)
        return mask
    return active >= numpy.sort(active, axis=None)[-K * len(active)]


@pytest.mark.parametrize("sae", ["topk", "batch_topk"], indirect=True)
def test_losses_are_those_of_numpy(sae, x):
    dead = torch.zeros(N, dtype=torch.bool)
    dead[[2, 5, 7, 11]] = True
    found = losses(sae, x, dead, 2)
    w = {name: tensor.detach().numpy() for name, tensor in sae.state_dict().items()}
    normalized = x.numpy() / 2
    pre = (normalized - w["bias"]) @ w["encoder"].T
    z = numpy.where(kept(pre, sae.activation), numpy.maximum(pre, 0), 0)
    error = normalized - z @ w["decoder"] - w["bias"]
    assert found.reconstruction.item() == pytest.approx((error**2).sum(1).mean())
    silent = numpy.where(dead.numpy(), pre, -numpy.inf)
    order = numpy.argsort(-silent, axis=1)[:, :2]
    chosen = numpy.take_along_axis(silent, order, 1)
    guess = numpy.einsum("tk,tkf->tf", chosen, w["decoder"][order])
    assert found.auxiliary.item() == pytest.approx(((error - guess) ** 2).sum(1).mean())
    assert found.fired.tolist() == (z > 0).any(0).tolist()
    assert found.smallest.item() == pytest.approx(z[z > 0].min())


@pytest.mark.parametrize("sae", ["topk", "batch_topk"], indirect=True)
def test_gradients_are_those_of_the_dense_formula(sae, x):
    dead = torch.arange(N) % 4 == 0
    found = losses(sae, x, dead, 3)
    parameters = [sae.encoder, sae.decoder, sae.bias]
    sparse = torch.autograd.grad(found.reconstruction + found.auxiliary / 32, parameters)
    normalized = x / sae.scale
    pre = (normalized - sae.bias) @ sae.encoder.T
    mask = torch.from_numpy(kept(pre.detach().numpy(), sae.activation))
    error = normalized - (pre.relu() * mask) @ sae.decoder - sae.bias
    silent = pre.masked_fill(~dead, -torch.inf)
    chosen = torch.zeros_like(pre).scatter(1, silent.topk(3, dim=1).indices, 1.0)
    guess = (pre * chosen) @ sae.decoder
    total = error.square().sum(1).mean() + (error.detach() - guess).square().sum(1).mean() / 32
    for one, other in zip(sparse, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-3


def test_without_dead_latents_there_is_no_auxiliary_loss(sae, x):
    none, all_of_them = torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)
    assert losses(sae, x, none, 5).auxiliary.item() == 0
    assert losses(sae, x, all_of_them, 0).auxiliary.item() == 0
    assert losses(sae, x, all_of_them, 5).auxiliary.item() > 0


def test_batch_topk_lets_tokens_share(sae, x):
    """As many latents on average, wherever they are largest; some tokens may have none."""
    sae.activation = "batch_topk"
    x = torch.cat([x, sae.bias.detach()[None] * sae.scale])  # a token with nothing to say
    losses(sae, x, torch.zeros(N, dtype=torch.bool), 0).reconstruction.backward()
    assert torch.isfinite(sae.encoder.grad).all()


def test_explained_variance_is_1_of_perfect_and_0_of_mean_reconstruction(x):
    x = x.float()
    sae = SparseAutoencoder(D, 2 * D, 2 * D).requires_grad_(False)
    sae.encoder.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    sae.decoder.copy_(sae.encoder)
    assert explained_variance(sae, x) == pytest.approx(1, abs=1e-6)
    sae.decoder.zero_()
    sae.bias.copy_(x.mean(0))
    assert explained_variance(sae, x) == pytest.approx(0, abs=1e-6)


def test_the_geometric_median_is_what_an_optimiser_finds():
    points = numpy.random.default_rng(0).exponential(size=(200, 3))
    found = geometric_median(torch.from_numpy(points)).double().numpy()

    def distance(point):
        return numpy.linalg.norm(points - point, axis=1).sum()

    best = scipy.optimize.minimize(
        distance, points.mean(0), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}
    )
    numpy.testing.assert_allclose(found, best.x, atol=1e-3)
    assert distance(found) < distance(points.mean(0))
