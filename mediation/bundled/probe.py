"""The attribute probe: a small convolutional classifier that says what an emoji picture shows."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class AttributeProbe(ModelMixin, ConfigMixin):
    """Classifies 64×64 images by one head per factor; it shares no weights with the pipeline it judges.

    Args:
        factors: the labels of each factor, in class order: {"object": ["cat", …], "style": […], …}.
        widths: channels of the five convolutions, all of which but the second halve the picture.

    Example:
        >>> probe = AttributeProbe({"count": [1, 2, 3]}).eval()
        >>> probe.probabilities(torch.zeros(2, 3, 64, 64), "count").shape
        torch.Size([2, 3])
    """

    @register_to_config
    def __init__(self, factors: dict[str, list], widths: tuple[int, ...] = (40, 48, 96, 192, 256)):
        super().__init__()
        stages, previous = [], 3
        for stage, width in enumerate(widths):
            kernel, stride = 5 if stage == 0 else 3, 1 if stage == 1 else 2
            stages += [nn.Conv2d(previous, width, kernel, stride, kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
            previous = width
        self.trunk = nn.Sequential(*stages, nn.Flatten())
        side = 64 // 2 ** (len(widths) - 1)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(previous * side**2, len(values)) for name, values in factors.items()}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits by factor, each (image, class), of `images` in [0, 1], (image, 3, 64, 64)."""
        features = self.trunk(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}

    def labels(self, factor: str) -> list:
        """The labels of one factor, in class order."""
        if factor not in self.heads:
            raise KeyError(f"the probe knows the factors {sorted(self.heads)}, not {factor!r}")
        return list(self.config.factors[factor])

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor, factor: str) -> torch.Tensor:
        """Class probabilities of one factor, (image, class)."""
        self.labels(factor)
        return self(images.to(self.dtype))[factor].float().softmax(-1)
