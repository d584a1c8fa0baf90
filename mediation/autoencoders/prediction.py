"""Layouts: where a picture will show what, predicted from latents at steps from which no eye could tell."""

import dataclasses
import json
from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
import xarray
from diffusers import DiffusionPipeline

from mediation.autoencoders.dictionary import check_dictionary
from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.observing import check_prompts, observe
from mediation.autoencoders.splicing import check_spliceable
from mediation.pipelines import family_of
from mediation.provenance import provenance
from mediation.sampling import Sampling


def predict_layout(
    pipe: DiffusionPipeline,
    sae: SparseAutoencoder,
    dictionary: xarray.Dataset,
    prompts: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    seed: int = 1_000_000,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    batch_size: int | None = None,
) -> xarray.Dataset:
    """Predicts where finished pictures will show what; sampling ends with the last step that the autoencoder reads.

    An autoencoder of the first step predicts from pure noise. Scores and layouts are those of `mediation.emergence`,
    which compares them with the pictures; there, only labels that a picture has compete.

    Args:
        pipe: a diffusers pipeline of a supported family.
        sae: an autoencoder that knows its place.
        dictionary: of it, from `mediation.concept_dictionary`.
        prompts: one picture each.
        labels: of the dictionary, those that compete for each pixel; None is all of them.
        seed: of the first picture's noise; each further one has the next.
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance.
        batch_size: rows of one call of the pipeline; None suits the latents' size.

    Returns:
        A Dataset: score (case, label, site_y, site_x), how much the latents there speak for a label, at the site's
        resolution; layout (case, y, x), the number of the label with the largest score, at the picture's. Names are
        `found.label[found.layout]`.

    Raises:
        KeyError, TypeError, ValueError: before any work, if an argument does not fit the pipeline or another.

    Example:
        >>> import mediation
        >>> from mediation import bundled
        >>> pipe = mediation.load_pipeline()
        >>> sae = mediation.SparseAutoencoder(192, 384, k=8, place=mediation.Place("unet.mid.0"))
        >>> options = {"num_inference_steps": 2}
        >>> labeller = bundled.label_composition
        >>> dictionary = mediation.concept_dictionary(pipe, sae, ["a cat", "a dog"], labeller, n_top=1, **options)
        >>> found = mediation.predict_layout(pipe, sae, dictionary, ["a red fox"], **options)
        >>> found.layout.dims, found.layout.shape
        (('case', 'y', 'x'), (1, 64, 64))
    """
    prompts = check_prompts(prompts)
    check_spliceable(pipe, sae, "cond")
    check_dictionary(dictionary, sae)
    known = dictionary.label.values.tolist()
    labels = known if labels is None else list(labels)
    if unknown := [label for label in labels if label not in known]:
        raise KeyError(f"the dictionary has no label {', '.join(map(repr, unknown))}; it has {', '.join(known[:5])}, …")
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"expected at least one label, each once, got {labels}")
    sampling, seeds = Sampling(num_inference_steps, guidance_scale), range(seed, seed + len(prompts))
    votes = votes_of(dictionary)[:, [known.index(label) for label in labels]]
    _, height, width = family_of(pipe).latent_shape(pipe)
    size = (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor)
    scores = []
    with torch.no_grad():
        for found in observe(pipe, prompts, seeds, [sae.place], sampling=sampling, batch_size=batch_size):
            scores += [score_labels(sae.encode(one).cpu(), votes) for one in found.activations[sae.place]]
    return xarray.Dataset(
        {
            "score": (("case", "label", "site_y", "site_x"), torch.stack(scores).numpy()),
            "layout": (("case", "y", "x"), numpy.stack([winners(one, size).numpy() for one in scores])),
        },
        coords={
            "label": labels,
            "case": range(len(prompts)),
            "prompt": ("case", prompts),
            "seed": ("case", list(seeds)),
        },
        attrs={"place": str(sae.place), **dataclasses.asdict(sampling), "provenance": json.dumps(provenance(pipe))},
    )


def composition_iou(scores: torch.Tensor, labels: Sequence[str], masks: dict[str, torch.Tensor]) -> float:
    """The mean IoU of a predicted layout with masks.

    Args:
        scores: (label, y, x), at any resolution.
        labels: of the scores.
        masks: (height, width) by label, without overlap.

    Returns:
        The mean over the labels that have both; NaN if there are none.

    Example:
        >>> left = torch.tensor([[True, False]])
        >>> scores = torch.stack([left.float(), 1 - left.float()])
        >>> composition_iou(scores, ["cat", "ground"], {"cat": left, "ground": ~left})
        1.0
    """
    present = [label for label, mask in masks.items() if label in labels and mask.any()]
    if not present:
        return float("nan")
    predicted = winners(scores[[labels.index(label) for label in present]], tuple(masks[present[0]].shape))
    found = []
    for number, label in enumerate(present):
        here, there = predicted == number, masks[label]
        found.append(float((here & there).sum()) / float((here | there).sum()))
    return sum(found) / len(found)


def votes_of(dictionary: xarray.Dataset) -> torch.Tensor:
    """How much more often than anywhere a label is met where a latent is active, (latent, label)."""
    counts = dictionary[["area", "n_positions"]].sum("fold")
    base = counts.area / counts.n_positions
    return torch.from_numpy((dictionary.precision - base).fillna(0).transpose("latent", "label").values).float()


def score_labels(latents: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
    """Scores (label, y, x) of latents (step, y, x, latent), of all steps together.

    Example:
        >>> score_labels(torch.tensor([[[[2.0, 1.0]]]]), torch.tensor([[0.5], [-0.25]])).tolist()
        [[[0.75]]]
    """
    return (latents.sum(0) @ votes).permute(2, 0, 1)


def winners(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The number of the label with the largest score, (height, width), of scores (label, y, x) that are enlarged.

    Example:
        >>> winners(torch.tensor([[[1.0, 0.0]], [[0.2, 0.2]]]), (1, 4)).tolist()
        [[0, 0, 0, 1]]
    """
    return F.interpolate(scores[None].float(), size, mode="bilinear")[0].argmax(0)
