"""`train_sae` and `fit_sae`: from a pipeline, or from activations that are there, to a trained autoencoder."""

import os
from collections.abc import Sequence

from diffusers import DiffusionPipeline

from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.places import Place
from mediation.autoencoders.sources import Source, Stored, Streamed
from mediation.autoencoders.store import origin_of
from mediation.autoencoders.training import Recipe, train
from mediation.provenance import provenance
from mediation.sampling import Sampling

_DEFAULT = Recipe()


def train_sae(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    site: str,
    steps: Sequence[float] = (1.0,),
    branch: str = "cond",
    n_latents: int | None = None,
    k: int = 10,
    activation: str = "topk",
    recipe: Recipe = _DEFAULT,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    buffer: int = 65_536,
    batch_size: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> SparseAutoencoder:
    """Trains a sparse autoencoder on what a site computes while a pipeline draws prompts, one per site and stage.

    Activations go straight from the pipeline into training, `buffer` positions at a time, shuffled. Each window has
    noise of its own, so that none is seen twice. To train several, store the activations first: `collect_activations`.

    Args:
        pipe: a diffusers pipeline of a supported family.
        prompts: drawn from at random.
        site: a site of the denoiser, as "unet.mid.0", the transformer there, whose output − input is read.
        steps: t, what is left of sampling: 1 is the first step, 0 the last.
        branch: the half of guidance that is read, "cond" or "uncond".
        n_latents: width of the dictionary; None is four times the site's.
        k: latents that are active at a position.
        activation: "topk" or "batch_topk".
        recipe: how long and how to train.
        seed: of the initial weights, of the choice of prompts, of the noise and of the order.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        buffer: positions that are shuffled at a time, rounded up to whole pictures. In memory are these, at most 8192
            that are held out, each features × 4 bytes and 8 for the order, and what one call of the pipeline computes.
        batch_size: rows of one call of the pipeline; None suits the latents' size.
        checkpoint: a .safetensors file in which training is kept after each window, and from which it goes on.
        progress: shows a progress bar on a terminal.

    Returns:
        The autoencoder. Its metadata has the recipe, and explained variance and dead latents after each window.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline.

    Example:
        >>> import mediation
        >>> pipe, recipe = mediation.load_pipeline(), mediation.Recipe(n_positions=64, batch_size=32)
        >>> options = {"site": "unet.mid.0", "recipe": recipe, "buffer": 64, "num_inference_steps": 2}
        >>> mediation.train_sae(pipe, ["a cat", "a dog"], n_latents=32, k=4, **options)
        SparseAutoencoder(192 features, 32 latents, topk, k=4, unet.mid.0 at t=1, cond)
    """
    place = Place(site, tuple(steps), branch)
    sampling = Sampling(num_inference_steps, guidance_scale)
    # a window need not hold more than training sees
    options = {"sampling": sampling, "buffer": min(buffer, recipe.n_positions), "seed": seed, "batch_size": batch_size}
    source = Streamed(pipe, prompts, place, **options)
    sae = _new(source, n_latents, k, activation, place, seed, provenance(pipe))
    return train(sae, source, recipe, seed=seed, checkpoint=checkpoint, progress=progress)


def fit_sae(
    activations,
    *,
    place: Place | None = None,
    n_latents: int | None = None,
    k: int = 10,
    activation: str = "topk",
    recipe: Recipe = _DEFAULT,
    seed: int = 0,
    buffer: int = 65_536,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> SparseAutoencoder:
    """Trains a sparse autoencoder on activations that are there; the last twentieth is held out.

    Args:
        activations: (position, feature), of numpy, torch or Zarr; of a Zarr array, at most `buffer` positions are in
            memory at a time, beside at most 8192 that are held out.
        place: where in a pipeline they come from, so that the autoencoder can be used there.
        n_latents: width of the dictionary; None is four times the activations'.
        k: latents that are active at a position.
        activation: "topk" or "batch_topk".
        recipe: how long and how to train.
        seed: of the initial weights and of the order.
        buffer: positions that are shuffled at a time, at most.
        checkpoint: a .safetensors file in which training is kept after each window, and from which it goes on; not on
            other activations, by a hash of some of them.
        progress: shows a progress bar on a terminal.

    Returns:
        As `train_sae`. Of what `collect_activations` stored, the metadata has prompts, counts, seed and pipeline, too.

    Raises:
        ValueError: before any work, if an argument is out of its range.

    Example:
        >>> import torch, mediation
        >>> points = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> mediation.fit_sae(points, k=2, recipe=mediation.Recipe(n_positions=2000, batch_size=100))
        SparseAutoencoder(8 features, 32 latents, topk, k=2)
    """
    source = Stored(activations, buffer=buffer, origin=origin_of(activations))
    sae = _new(source, n_latents, k, activation, place, seed, {})
    return train(sae, source, recipe, seed=seed, checkpoint=checkpoint, progress=progress)


def _new(source: Source, n_latents, k, activation, place, seed, metadata) -> SparseAutoencoder:
    n_latents = 4 * source.n_features if n_latents is None else n_latents
    options = {"activation": activation, "place": place, "seed": seed, "metadata": metadata}
    return SparseAutoencoder(source.n_features, n_latents, k, **options)
