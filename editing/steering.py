"""Steering: more or less of a concept while a picture is drawn, everywhere or in a region, in a stage of sampling."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy
import torch
import xarray
from diffusers import DiffusionPipeline

from mediation.autoencoders import SparseAutoencoder, concept_latents, spliced
from mediation.autoencoders.dictionary import check_dictionary
from mediation.autoencoders.places import Moment, check_stage
from mediation.autoencoders.splicing import check_spliceable
from mediation.autoencoders.tally import on_grid

UNITS = ("relative", "norm", "share")
_HALVES = {
    "left": [[True, False], [True, False]],
    "right": [[False, True], [False, True]],
    "top": [[True, True], [False, False]],
    "bottom": [[False, False], [True, True]],
}


@contextlib.contextmanager
def steer(
    pipe: DiffusionPipeline,
    sae: SparseAutoencoder,
    concept: int | str | Sequence[int],
    *,
    strength: float,
    region: "str | numpy.typing.ArrayLike | torch.Tensor | None" = None,
    stage: tuple[float, float] = (0.0, 1.0),
    branch: str = "cond",
    units: str = "relative",
    dictionary: xarray.Dataset | None = None,
) -> Iterator[None]:
    """Steers what the pipeline draws inside by the latents of a concept (Tinaz et al. 2025, arXiv:2504.15473).

    With z_ij the latents at a position, f_c the directions of the concept's latents C, and β the strength, the site's
    activation gains, in units of the autoencoder's scale,

        everywhere:      β w_ij Σ_c f_c
        with a region:   β w_ij Σ_c f_c   inside,   −Σ_c z_ij,c f_c   outside, where the concept is taken away

    where w_ij is ||z_ij|| ("norm", as in the paper within regions), ||z_ij|| / Σ_ij ||z_ij|| ("share", as in the paper
    everywhere), or ||z_ij|| times what makes strength the size of the change, √Σ||added||² / √Σ||x||² over the
    positions it is added to ("relative"): 1 adds as much as there is, whatever the site, the step and the concept.

    Contexts can be nested: an outer one reads what the inner ones left. So each stage can have the autoencoder that was
    trained on it, and several concepts can have regions of their own.

    Args:
        pipe: a diffusers pipeline of a supported family.
        sae: an autoencoder that knows its place.
        concept: a latent, or several that are steered together; or a label of `dictionary`, for its best latent.
        strength: β; below 0, the concept is pushed away.
        region: part of the picture, as "left" or "bottom right", or a mask (y, x) of it at any resolution, 0
            outside; a position of the site is inside if half of it is. None is everywhere.
        stage: (start, stop) in t, what is left of sampling, above start and up to stop: (0.6, 1.0) is the first 40%.
        branch: the half of guidance that is changed: "cond", "uncond" or "both".
        units: of the strength: "relative", "norm" or "share".
        dictionary: from `mediation.concept_dictionary` of this autoencoder, for concepts by name.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline or the autoencoder.

    Example:
        >>> import editing, mediation
        >>> pipe = mediation.load_pipeline()
        >>> sae = mediation.SparseAutoencoder(192, 384, k=8, place=mediation.Place("unet.mid.0"))
        >>> with editing.steer(pipe, sae, 7, strength=0.5, region="left", stage=(0.6, 1.0)):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
    """
    check_spliceable(pipe, sae, branch)
    latents = _latents(sae, concept, dictionary)
    stage = check_stage(stage)
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}")
    if units not in UNITS:
        raise ValueError(f"units must be one of {', '.join(UNITS)}; got {units!r}")
    mask = None if region is None else _mask(region)

    def edit(before: torch.Tensor, activations: torch.Tensor, _moment: Moment) -> torch.Tensor:
        inside = None if mask is None else _on_site(mask, before)
        size = sae.scale * sae.decoder[latents].sum(0).norm()
        return steered(before, activations, latents, size, strength=strength, inside=inside, units=units)

    with spliced(pipe, sae, edit, stage=stage, branch=branch):
        yield


def steered(
    latents: torch.Tensor,
    activations: torch.Tensor,
    chosen: Sequence[int],
    size: torch.Tensor | float,
    *,
    strength: float,
    inside: torch.Tensor | None,
    units: str,
) -> torch.Tensor:
    """Latents after steering: a pure function, of each row by itself.

    Args:
        latents: z, (row, y, x, latent).
        activations: x, (row, y, x, feature).
        chosen: the concept's latents.
        size: norm of what a unit of all of them together adds to an activation.
        strength: β.
        inside: the region, (y, x), or None.
        units: as of `steer`.

    Returns:
        z', a new tensor.

    Example:
        >>> latents = torch.tensor([[[[3.0, 4.0]]]])  # one position, of norm 5
        >>> options = {"strength": 2.0, "inside": None, "units": "norm"}
        >>> steered(latents, torch.ones(1, 1, 1, 3), [0], 1.0, **options).flatten().tolist()
        [13.0, 4.0]
    """
    norms = latents.norm(dim=-1)
    weights = norms if inside is None else norms * inside
    if units == "share":
        weights = weights / norms.sum((1, 2), keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)
    elif units == "relative":
        there = activations.square().sum(-1).to(weights)
        there = (there if inside is None else there * inside).sum((1, 2), keepdim=True)
        added = (weights * size).square().sum((1, 2), keepdim=True)
        # where no latent is active there is nothing to scale, and nothing is added
        weights = weights * torch.where(added > 0, there / added.clamp(min=torch.finfo(added.dtype).tiny), 0).sqrt()
    changed = latents.clone()
    if inside is not None:
        changed[..., chosen] *= inside[..., None]
    changed[..., chosen] += strength * weights[..., None]
    return changed


def _latents(sae: SparseAutoencoder, concept: int | str | Sequence[int], dictionary) -> list[int]:
    if dictionary is not None:
        check_dictionary(dictionary, sae)
    if isinstance(concept, str):
        if dictionary is None:
            raise ValueError(f"to steer {concept!r} by name, pass dictionary=mediation.concept_dictionary(…)")
        return concept_latents(dictionary, concept, k=1)
    if not isinstance(concept, Iterable | int | numpy.integer):
        raise TypeError(f"a concept is a latent's number, several, or a label, got {concept!r}")
    return sae.check_latents(concept if isinstance(concept, Iterable) else [concept])


def named_region(name: str) -> torch.Tensor:
    """The mask (y, x) of a half of the picture, as "left", or of a quarter, as "bottom right".

    Raises:
        ValueError: if the name is no such part.

    Example:
        >>> named_region("bottom right")
        tensor([[False, False],
                [False,  True]])
    """
    words = name.replace("-", " ").split()
    if not words or not set(words) <= set(_HALVES):
        raise ValueError(f"a region is called {', '.join(_HALVES)}, or by two of these names; got {name!r}")
    return torch.tensor([_HALVES[word] for word in words]).all(0)


def _mask(region) -> torch.Tensor:
    if isinstance(region, str):
        region = named_region(region)
    # a picture's mask may be 0 and 255, and what counts is how much of a position is inside
    mask = torch.as_tensor(region if isinstance(region, torch.Tensor) else numpy.asarray(region)) != 0
    if mask.ndim != 2 or not mask.any():
        raise ValueError(f"a region is a mask (y, x) that is true somewhere, got shape {tuple(mask.shape)}")
    return mask


def _on_site(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The region (y, x) at a site's resolution, 1 inside and 0 outside.

    Raises:
        ValueError: if no position is half inside.
    """
    size = tuple(latents.shape[1:3])
    inside = on_grid(mask, size).to(latents)
    if not inside.any():
        raise ValueError(f"the region is too small: it covers half of no position of a site of {size[0]}×{size[1]}")
    return inside
