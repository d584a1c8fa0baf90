"""Emoji Diffusion: the bundled text-to-image model, the CLIP that scores it, and the probe that judges it."""

import functools
import pathlib

import numpy
import torch
from diffusers import DiffusionPipeline

from mediation.autoencoders.model import SparseAutoencoder
from mediation.bundled.labelling import label_composition, label_emoji_with
from mediation.bundled.probe import AttributeProbe
from mediation.metrics import ClassProbability, CLIPScore

_FOLDER = pathlib.Path(__file__).parent / "emoji"


def pipeline_folder() -> pathlib.Path:
    """The folder of the bundled `StableDiffusionPipeline`."""
    return _FOLDER / "pipeline"


def is_bundled(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline was loaded from the bundled folder."""
    return pathlib.Path(pipe.config.get("_name_or_path") or "").resolve() == pipeline_folder().resolve()


@functools.cache
def load_scorer() -> CLIPScore:
    """CLIPScore by the CLIP whose text tower is the bundled pipeline's text encoder."""
    return CLIPScore.from_pretrained(_FOLDER / "clip")


@functools.cache
def load_probe() -> AttributeProbe:
    """The attribute probe, which shares no weights with the pipeline."""
    return AttributeProbe.from_pretrained(_FOLDER / "probe", low_cpu_mem_usage=False).float().eval()


def attribute_probability(factor: str, target: object = None) -> ClassProbability:
    """The metric "probability of an attribute, says the probe".

    Args:
        factor: object, style, background, count, viewpoint or pose.
        target: a label of this factor; None is each case's subject.

    Example:
        >>> attribute_probability("style", "ink").name
        'probability_of_ink'
    """
    probe = load_probe()
    labels = probe.labels(factor)
    name = f"probability_of_{factor if target is None else target}"
    return ClassProbability(lambda images: probe(images)[factor], labels, target, name=name)


def label_emoji(image: torch.Tensor) -> dict[str, numpy.ndarray]:
    """Masks by object, style and background, named by the probe, of an image (3, height, width) in [0, 1].

    Example:
        >>> sorted(label_emoji(torch.ones(3, 64, 64)))[0]
        'background: white'
    """
    return label_emoji_with(load_probe(), image)


def load_sae() -> SparseAutoencoder:
    """The autoencoder of "unet.up.1.0" at the first step: 512 latents, 8 active."""
    return SparseAutoencoder.from_pretrained(_FOLDER / "sae")


__all__ = [
    "AttributeProbe",
    "attribute_probability",
    "is_bundled",
    "label_composition",
    "label_emoji",
    "load_probe",
    "load_sae",
    "load_scorer",
    "pipeline_folder",
]
