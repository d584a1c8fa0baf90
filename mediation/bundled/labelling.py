"""Masks of what pictures of Emoji Diffusion show: its pictures are sprites on plain ground."""

import numpy
import scipy.ndimage
import torch

from mediation.bundled.probe import AttributeProbe

_CONTRAST = 0.12  # difference from the ground, in any channel, that a sprite makes; noise of the VAE stays below


def foreground(image: torch.Tensor) -> numpy.ndarray:
    """Where an image (3, height, width) in [0, 1] differs from its border, holes filled, (height, width).

    Example:
        >>> image = torch.ones(3, 8, 8)
        >>> image[:, 2:6, 2:6] = 0
        >>> int(foreground(image).sum())
        16
    """
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    ground = border.median(dim=1).values
    contrast = (image - ground[:, None, None]).abs().amax(0).cpu().numpy()
    strong = contrast[contrast > _CONTRAST]
    # soft edges are cut where they have half of the sprite's usual contrast
    differs = contrast > max(_CONTRAST, numpy.median(strong) / 2 if len(strong) else 0)
    # single pixels are noise
    return scipy.ndimage.binary_fill_holes(scipy.ndimage.binary_opening(differs, numpy.ones((2, 2))))


def label_composition(image: torch.Tensor) -> dict[str, numpy.ndarray]:
    """Masks of "object" and "background", which divide an image (3, height, width) in [0, 1]."""
    shown = foreground(image)
    return {"object": shown, "background": ~shown}


@torch.no_grad()
def label_emoji_with(probe: AttributeProbe, image: torch.Tensor) -> dict[str, numpy.ndarray]:
    """Masks by object, style and background, named by a probe, of an image (3, height, width) in [0, 1]."""
    pixels = torch.nn.functional.interpolate(image[None].to(probe.dtype), (64, 64), mode="area")
    seen = {factor: probe.labels(factor)[int(logits.argmax())] for factor, logits in probe(pixels).items()}
    shown = foreground(image)
    masks = {f"object: {seen['object']}": shown, f"style: {seen['style']}": shown}
    return masks | {f"background: {seen['background']}": ~shown}
