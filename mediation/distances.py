"""Distances from the clean run, as metrics: minus how far a run's latents or image ended from it."""

import dataclasses
from collections.abc import Sequence

import torch

from mediation.cases import Case
from mediation.metrics import DifferentiableMetric


class Distance(DifferentiableMetric):
    """A metric that is largest at the clean run, 0 there, and so has no gradient to start from."""


@dataclasses.dataclass(frozen=True)
class LatentDistance(Distance):
    """Minus the root mean square distance of the final latents from the clean run's; the clean run scores 0.

    Example:
        >>> LatentDistance()(None, torch.tensor([[[[0.0]]], [[[3.0]]]]), []).tolist()
        [-0.0, -3.0]
    """

    name = "latent_distance"
    needs_images = False

    def score(self, images, latents: torch.Tensor, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients; at the clean run there is none, the distance being least there."""
        difference = latents.double() - latents[:1].double()
        return -difference.square().mean((1, 2, 3)).sqrt()


@dataclasses.dataclass(frozen=True)
class ImageMSE(Distance):
    """Minus the mean squared error of an image in [0, 1] from the clean run's, over pixels and channels.

    Example:
        >>> ImageMSE()(torch.tensor([[[[0.0, 1.0]]], [[[0.5, 1.0]]]]), None, []).tolist()
        [-0.0, -0.125]
    """

    name = "image_mse"
    needs_images = True

    def score(self, images: torch.Tensor, latents, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients; at the clean run they are 0, the error being least there."""
        return -(images.double() - images[:1].double()).square().mean((1, 2, 3))


class LPIPS(Distance):
    """Minus the LPIPS distance of an image from the clean run's (Zhang et al. 2018, arXiv:1801.03924); that scores 0.

    It needs the extra `lpips`, which brings torchvision. The first use of a network downloads its ImageNet weights
    from pytorch.org; they are pickled, as those of that package are.

    Args:
        net: whose features are compared: "alex", of which the authors say that it does best, "vgg" or "squeeze".

    Raises:
        ValueError: if there is no such network.
        ImportError: if the package cannot be imported.

    Example:
        >>> distance = LPIPS("vgg")  # doctest: +SKIP
        >>> LPIPS("resnet")
        Traceback (most recent call last):
        ValueError: net must be alex, vgg or squeeze, got 'resnet'
    """

    name = "lpips"
    needs_images = True

    def __init__(self, net: str = "alex"):
        if net not in ("alex", "vgg", "squeeze"):
            raise ValueError(f"net must be alex, vgg or squeeze, got {net!r}")
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                f'LPIPS needs the lpips package: pip install "diffusion-mediation[lpips]" ({error})'
            ) from error
        self._network = lpips.LPIPS(net=net, verbose=False)
        self.options = {"net": net}

    def score(self, images: torch.Tensor, latents, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients; at the clean run they are 0, the distance being least there."""
        return -self.distance(images, images[:1])

    def distance(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """LPIPS distance of each image in [0, 1] from its other one, (row,), or of all from a single one."""
        images = images.float()
        return self._network.to(images.device)(images, others.float(), normalize=True).flatten()
