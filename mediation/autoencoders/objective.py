"""What training minimises, with the cost of the few latents that are active and not of all.

Only the pre-activations need every latent. What is chosen of them is kept as a list of latents, token after token, and
sums over it are those of `torch.nn.functional.embedding_bag`, forward and back.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mediation.autoencoders.model import SparseAutoencoder

# tokens that are in float64 at a time: memory for sums over many does not grow with them
PART = 4096


class Chosen(NamedTuple):
    """The active latents of several tokens (activations at one position), token after token.

    Attributes:
        latents: which ones.
        offsets: (token,), where those of each token begin.
        values: how active they are.
    """

    latents: torch.Tensor
    offsets: torch.Tensor
    values: torch.Tensor


class Losses(NamedTuple):
    """Means over tokens, in units of normalised activations.

    Attributes:
        reconstruction: ||x − x̂||².
        auxiliary: ||e − ê||², where e = x − x̂ is held fixed and ê is the sum of directions that dead latents make of
            x; 0 if there are none.
        fired: (latent,), whether each was active in any token.
        smallest: the smallest chosen latent above 0.
    """

    reconstruction: torch.Tensor
    auxiliary: torch.Tensor
    fired: torch.Tensor
    smallest: torch.Tensor


def losses(sae: SparseAutoencoder, activations: torch.Tensor, dead: torch.Tensor, n_auxiliary: int) -> Losses:
    """The terms of the objective, with gradients (Gao et al. 2024, arXiv:2406.04093, appendix A.2).

    Args:
        sae: the autoencoder.
        activations: (token, feature).
        dead: (latent,), which latents count as dead.
        n_auxiliary: of them, how many each token may use for the remaining error; 0 leaves the term out.

    Example:
        >>> sae = SparseAutoencoder(n_features=4, n_latents=8, k=2)
        >>> found = losses(sae, torch.ones(3, 4), torch.zeros(8, dtype=torch.bool), 0)
        >>> torch.allclose(found.reconstruction, (torch.ones(3, 4) - sae(torch.ones(3, 4))).square().sum(1).mean())
        True
    """
    normalized = sae.normalize(activations)
    centred = normalized - sae.bias
    with torch.no_grad():
        active = F.linear(centred, sae.encoder, sae.latent_bias)
    kept = _activated(sae, centred, _largest(active, sae.k, together=sae.activation == "batch_topk"))
    kept = kept._replace(values=kept.values.relu())
    error = normalized - _sum(kept, sae.decoder) - sae.bias
    auxiliary = torch.zeros((), dtype=error.dtype, device=error.device)
    candidates = dead.nonzero()[:, 0]
    if n_auxiliary and len(candidates):
        found = _largest(active[:, candidates], min(n_auxiliary, len(candidates)), together=False)
        # without ReLU, as in SAELens, so that latents which are silent everywhere have a gradient too
        found = _activated(sae, centred, found._replace(latents=candidates[found.latents]))
        auxiliary = (error.detach() - _sum(found, sae.decoder)).square().sum(1).mean()
    positive = kept.values.detach() > 0
    fired = torch.zeros_like(dead).index_fill_(0, kept.latents[positive], True)
    smallest = kept.values.detach()[positive].min() if positive.any() else torch.zeros_like(auxiliary)
    return Losses(error.square().sum(1).mean(), auxiliary, fired, smallest)


@torch.no_grad()
def explained_variance(reconstruct: Callable[[torch.Tensor], torch.Tensor], activations: torch.Tensor) -> float:
    """1 − Σ||x − x̂||² / Σ||x − mean||² over activations (token, feature), where x̂ is what `reconstruct` makes of x.

    Example:
        >>> sae = SparseAutoencoder(n_features=1, n_latents=1, k=1)
        >>> _ = sae.decoder.data.fill_(1), sae.encoder.data.fill_(1)
        >>> explained_variance(sae, torch.tensor([[1.0], [2.0]]))
        1.0
    """
    parts = activations.split(PART)
    mean = sum(part.double().sum(0) for part in parts) / len(activations)
    missed = sum(float((part - reconstruct(part).to(part)).double().square().sum()) for part in parts)
    return 1 - missed / sum(float((part.double() - mean).square().sum()) for part in parts)


def geometric_median(points: torch.Tensor, n_iterations: int = 100, tolerance: float = 1e-6) -> torch.Tensor:
    """The point with the smallest sum of distances to `points` (point, feature), by Weiszfeld's iteration.

    Example:
        >>> geometric_median(torch.tensor([[0.0], [1.0], [9.0]])).round(decimals=3)
        tensor([1.])
    """
    parts = points.split(PART)
    median = sum(part.double().sum(0) for part in parts) / len(points)
    size = sum((part.double() - median).norm(dim=1).sum() for part in parts) / len(points)
    for _ in range(n_iterations):
        total, weight = torch.zeros_like(median), 0.0
        for part in parts:
            wide = part.double()
            # kept above 0, where the median is one of the points
            weights = 1 / (wide - median).norm(dim=1).clamp(min=1e-12)
            total, weight = total + weights @ wide, weight + weights.sum()
        before, median = median, total / weight
        if (median - before).norm() <= tolerance * size:
            break
    return median.float()


def _largest(active: torch.Tensor, k: int, *, together: bool) -> Chosen:
    """The k largest entries of each row of `active` (token, latent), or, taken together, of all rows k on average."""
    n_tokens, n_latents = active.shape
    if not together:
        values, latents = active.topk(k, dim=1, sorted=False)
        offsets = torch.arange(0, latents.numel(), k, device=active.device)
        return Chosen(latents.flatten(), offsets, values.flatten())
    places = active.flatten().topk(k * n_tokens, sorted=False).indices.sort().values
    tokens = torch.arange(n_tokens, device=active.device)
    offsets = torch.searchsorted(places // n_latents, tokens)
    return Chosen(places % n_latents, offsets, active.flatten()[places])


def _activated(sae: SparseAutoencoder, centred: torch.Tensor, chosen: Chosen) -> Chosen:
    """The same latents, with pre-activations whose gradients reach the encoder and what it reads."""
    values = _Activate.apply(centred, sae.encoder, chosen.latents, chosen.offsets, chosen.values)
    return chosen._replace(values=values)


def _sum(chosen: Chosen, directions: torch.Tensor) -> torch.Tensor:
    """For each token, the sum of its latents' directions (latent, feature), each times its value."""
    return F.embedding_bag(chosen.latents, directions, chosen.offsets, mode="sum", per_sample_weights=chosen.values)


class _Activate(torch.autograd.Function):
    """<x, w_c> + … of chosen latents c, computed before for all, with gradients for the chosen ones alone."""

    @staticmethod
    def forward(ctx, centred, encoder, latents, offsets, values):
        ctx.save_for_backward(centred, encoder, latents, offsets)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        centred, encoder, latents, offsets = ctx.saved_tensors
        chosen = Chosen(latents, offsets, gradient)
        # The gradient of Σ_t <x_t, Σ_c g_tc w_c> in x is the inner sum, and in w what the encoder's gradient is.
        with torch.enable_grad():
            weight = encoder.detach().requires_grad_()
            pulled = _sum(chosen, weight)
            (at_encoder,) = torch.autograd.grad(pulled, weight, centred)
        return pulled.detach(), at_encoder, None, None, None
