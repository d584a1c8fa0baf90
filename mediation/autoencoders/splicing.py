"""Splicing: a pipeline runs with some latents of an autoencoder changed, and all else as it was."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from diffusers import DiffusionPipeline

from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.places import BRANCHES, Moment, check_stage, find_site, in_stage, visiting
from mediation.guards import check_traceable

# What latents (row, y, x, latent) of activations (row, y, x, feature) should be at some moment; the same tensor leaves
# them alone.
LatentEdit = Callable[[torch.Tensor, torch.Tensor, Moment], torch.Tensor]


@contextlib.contextmanager
def spliced(
    pipe: DiffusionPipeline,
    sae: SparseAutoencoder,
    edit: LatentEdit,
    *,
    stage: tuple[float, float] = (0.0, 1.0),
    branch: str = "cond",
) -> Iterator[None]:
    """Changes latents while the pipeline samples inside: x becomes x + decode(z') − decode(z).

    The reconstruction error stays in place, so an edit that changes nothing leaves every bit of the run as it was.

    Args:
        pipe: the pipeline.
        sae: an autoencoder that knows its place.
        edit: a function of latents z (row, y, x, latent), activations x (row, y, x, feature) and a
            `mediation.autoencoders.Moment` that returns z'.
        stage: (start, stop) in t, what is left of sampling, above start and up to stop: (0.6, 1.0) is the first 40%.
        branch: the half of guidance whose latents are changed: "cond", "uncond" or "both".

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline.
        ValueError: while it samples, if there is no guidance and "uncond" is asked for, or if activations have another
            width than the autoencoder was made for.

    Example:
        >>> import mediation
        >>> from mediation.autoencoders import Place, SparseAutoencoder, spliced
        >>> pipe = mediation.load_pipeline()
        >>> sae = SparseAutoencoder(192, 384, k=8, place=Place("unet.mid.0"))
        >>> with spliced(pipe, sae, lambda latents, activations, moment: 0 * latents, stage=(0.6, 1.0)):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
    """
    check_spliceable(pipe, sae, branch)
    stage = check_stage(stage)

    def visit(moment: Moment, activations: torch.Tensor) -> torch.Tensor | None:
        if not in_stage(stage, moment.t):
            return None
        chosen = [i for i, half in enumerate(moment.halves) if branch in (half, "both")]
        if not chosen:
            raise ValueError(f"without guidance there is no {branch} branch to change: choose a guidance_scale above 1")
        added = torch.zeros_like(activations)
        for half in chosen:
            latents = sae.encode(activations[half])
            changed = edit(latents, activations[half], moment)
            if changed is not latents:
                added[half] = sae.difference(changed, latents).to(added)
        return added

    with visiting(pipe, [(sae.place, visit)]):
        yield


def check_spliceable(pipe: DiffusionPipeline, sae: SparseAutoencoder, branch: str) -> None:
    """Checks that latents of an autoencoder can be changed in a pipeline.

    Raises:
        KeyError, TypeError, ValueError: if not.
    """
    check_traceable(pipe)
    if not isinstance(sae, SparseAutoencoder):
        raise TypeError(f"expected a mediation.SparseAutoencoder, got {type(sae).__name__}")
    if sae.place is None:
        raise ValueError("this autoencoder does not know its place: load it with place=mediation.Place(…)")
    find_site(pipe, sae.place.site)
    if branch not in (*BRANCHES, "both"):
        raise ValueError(f'branch must be "cond", "uncond" or "both", got {branch!r}')
