"""Concept dictionaries: how well the places where a latent is active coincide with what pictures show there."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch
import torch.nn.functional as F
import xarray
from diffusers import DiffusionPipeline
from tqdm import tqdm

from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.observing import check_prompts, observe
from mediation.autoencoders.splicing import check_spliceable
from mediation.autoencoders.tally import N_FOLDS, Tally
from mediation.provenance import provenance
from mediation.sampling import Sampling

# An image (3, height, width) in [0, 1] to masks (height, width) by label; "kind: value" are values of one kind. Numbers
# with a fraction are shares, of which 0.5 and above are covered; of integers and booleans, all that are not 0.
Labeller = Callable[[torch.Tensor], Mapping[str, "numpy.typing.ArrayLike"]]

_THUMBNAIL = 64  # pixels


def concept_dictionary(
    pipe: DiffusionPipeline,
    sae: SparseAutoencoder,
    prompts: Sequence[str],
    labeller: Labeller,
    *,
    seed: int = 0,
    n_top: int = 9,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> xarray.Dataset:
    """Compares where latents are active with masks of what the finished pictures show.

    At the steps that the autoencoder reads, a latent c is active at a set A_c of positions, over all pictures; a label
    l covers the set M_l. A position of the site has a label if at least half of its area does. Then

        IoU = |A_c ∩ M_l| / |A_c ∪ M_l|,    precision = |A_c ∩ M_l| / |A_c|,    recall = |A_c ∩ M_l| / |M_l|

    The same counts with each picture's masks from the picture before it say what a latent with the same habits, and no
    knowledge of the picture, would have: most latents prefer some part of the frame, and so do most objects.

    Args:
        pipe: a diffusers pipeline of a supported family.
        sae: an autoencoder that knows its place.
        prompts: one picture each; at least two.
        labeller: a function of an image (3, height, width) in [0, 1] that returns masks (height, width) by label.
            Labels such as "object: cat" and "object: dog" are values of one kind, "object". Of booleans and integers,
            as 0 and 255, all but 0 is covered; of floats, as a segmentation model's probabilities, 0.5 and above.
        seed: of the first picture's noise; each further one has the next.
        n_top: pictures that are kept for each latent, those in which it is most active.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: rows of one call of the pipeline; None suits the latents' size.
        progress: shows a progress bar on a terminal.

    Returns:
        A Dataset: iou, precision and recall by (latent, label), NaN where nothing is active or covered; n (latent), in
        how many pictures it is active. The counts behind them by fold, pictures with even and with odd numbers, so that
        a label chosen on one can be judged on the other: overlap and chance_overlap (fold, latent, label), active
        (fold, latent), area and chance_area (fold, label), n_positions (fold). And top_image, top_activation
        (latent, top), top_map (latent, top, y, x), with thumbnail (image, pixel_y, pixel_x, channel).

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline.
        ValueError: if the labeller returns no masks of the image's size.

    Example:
        >>> import mediation
        >>> from mediation import bundled
        >>> pipe = mediation.load_pipeline()
        >>> sae = mediation.SparseAutoencoder(192, 384, k=8, place=mediation.Place("unet.mid.0"))
        >>> options = {"num_inference_steps": 2, "n_top": 1}
        >>> prompts = ["a cat on a red background", "a dog"]
        >>> found = mediation.concept_dictionary(pipe, sae, prompts, bundled.label_emoji, **options)
        >>> found.iou.dims
        ('latent', 'label')
    """
    options = {"seed": seed, "n_top": n_top, "batch_size": batch_size, "progress": progress}
    options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    return concept_dictionaries(pipe, [sae], prompts, labeller, **options)[0]


def concept_dictionaries(
    pipe: DiffusionPipeline,
    saes: Sequence[SparseAutoencoder],
    prompts: Sequence[str],
    labeller: Labeller,
    *,
    seed: int = 0,
    n_top: int = 9,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[xarray.Dataset]:
    """The dictionary of each of several autoencoders, from the same pictures, which are drawn once.

    Args:
        pipe: a diffusers pipeline of a supported family.
        saes: autoencoders that know their places.
        prompts: as of `mediation.concept_dictionary`, like all that follows.
        labeller: likewise.
        seed: likewise.
        n_top: likewise.
        num_inference_steps: likewise.
        guidance_scale: likewise.
        batch_size: likewise.
        progress: likewise.

    Returns:
        What `mediation.concept_dictionary` returns, for each autoencoder.

    Raises:
        KeyError, TypeError, ValueError: likewise.

    Example:
        >>> import mediation
        >>> from mediation import bundled
        >>> pipe = mediation.load_pipeline()
        >>> places = [mediation.Place("unet.mid.0", (t,)) for t in (1, 0)]
        >>> saes = [mediation.SparseAutoencoder(192, 384, k=8, place=place) for place in places]
        >>> options = {"num_inference_steps": 2, "n_top": 1}
        >>> found = mediation.concept_dictionaries(pipe, saes, ["a cat", "a dog"], bundled.label_emoji, **options)
        >>> [dictionary.place for dictionary in found]
        ['unet.mid.0 at t=1, cond', 'unet.mid.0 at t=0, cond']
    """
    for sae in saes:
        check_spliceable(pipe, sae, "cond")
    prompts = check_prompts(prompts)
    if len(prompts) < N_FOLDS:
        raise ValueError(
            "a dictionary needs at least two prompts: labels are chosen on one part and judged on the other"
        )
    if not 1 <= n_top <= len(prompts):
        raise ValueError(f"n_top must be from 1 to the number of prompts, {len(prompts)}; got {n_top}")
    sampling = Sampling(num_inference_steps, guidance_scale)
    seeds = range(seed, seed + len(prompts))
    places = list(dict.fromkeys(sae.place for sae in saes))
    tallies, thumbnails = [Tally(sae.n_latents, n_top) for sae in saes], []
    options = {"sampling": sampling, "with_images": True, "batch_size": batch_size}
    with tqdm(total=len(prompts), desc="labelling", unit="image", disable=None if progress else True) as bar:
        for found in observe(pipe, prompts, seeds, places, **options):
            for row, image in enumerate(found.images):
                masks = label_masks(labeller, image)
                for sae, tally in zip(saes, tallies, strict=True):
                    tally.add(_latents(sae, found.activations[sae.place][row]), masks)
                thumbnails.append(_thumbnail(image))
            bar.update(len(found.prompts))
    attributes = {
        "labeller": getattr(labeller, "__name__", type(labeller).__name__),
        **dataclasses.asdict(sampling),
        "provenance": json.dumps(provenance(pipe)),
    }
    pictures = (("image", "pixel_y", "pixel_x", "channel"), numpy.stack(thumbnails))
    coordinates = {"prompt": ("image", prompts), "seed": ("image", list(seeds))}
    return [
        tally.finish()
        .assign(thumbnail=pictures)
        .assign_coords(coordinates)
        .assign_attrs(place=str(sae.place), k=sae.k, autoencoder=sae.fingerprint, **attributes)
        for sae, tally in zip(saes, tallies, strict=True)
    ]


def check_dictionary(dictionary: xarray.Dataset, sae: SparseAutoencoder) -> None:
    """Checks that a dictionary is about the latents of an autoencoder.

    Raises:
        ValueError: if it has another number of latents, or says that it was made for another place or other weights.

    Example:
        >>> from mediation.autoencoders.concepts import _example
        >>> check_dictionary(_example(), SparseAutoencoder(n_features=4, n_latents=2, k=1))
    """
    expected = {"place": str(sae.place), "autoencoder": sae.fingerprint}
    if dictionary.sizes["latent"] != sae.n_latents:
        problem = f"it has {dictionary.sizes['latent']} latents, and the autoencoder {sae.n_latents}"
    elif dictionary.attrs.get("place", expected["place"]) != expected["place"]:
        problem = f"it is of {dictionary.attrs['place']}, and the autoencoder reads {sae.place}"
    elif dictionary.attrs.get("autoencoder", expected["autoencoder"]) != expected["autoencoder"]:
        problem = "it was made with an autoencoder of other weights"
    else:
        return
    raise ValueError(f"the dictionary is not of this autoencoder: {problem}; make one of it by concept_dictionary")


def label_masks(labeller: Labeller, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a labeller says of an image, as boolean masks (height, width); of floats, 0.5 and above is covered.

    Raises:
        ValueError: if that is no mapping of names to masks of the image's size.
    """
    found = labeller(image)
    if not isinstance(found, Mapping):
        raise ValueError(f"a labeller returns masks by label, got {type(found).__name__}")
    masks = {str(label): _covered(torch.as_tensor(numpy.asarray(mask))) for label, mask in found.items()}
    for label, mask in masks.items():
        if mask.shape != image.shape[1:]:
            raise ValueError(
                f"the mask of {label!r} has shape {tuple(mask.shape)}, and the image {tuple(image.shape[1:])}"
            )
    return masks


def _covered(mask: torch.Tensor) -> torch.Tensor:
    return mask >= 0.5 if mask.is_floating_point() else mask != 0


@torch.no_grad()
def _latents(sae: SparseAutoencoder, activations: torch.Tensor) -> torch.Tensor:
    return sae.encode(activations).cpu()


def _thumbnail(image: torch.Tensor) -> numpy.ndarray:
    """An image (3, height, width) in [0, 1], (y, x, channel), no larger than needed, as integers from 0 to 255."""
    scale = min(1.0, _THUMBNAIL / max(image.shape[1:]))
    small = F.adaptive_avg_pool2d(image, [max(1, round(side * scale)) for side in image.shape[1:]])
    return (small * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
