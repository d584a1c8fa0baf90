"""Sparse autoencoders: an activation as the sum of a few directions out of many."""

import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from mediation import tensorfiles
from mediation.autoencoders import checkpoints
from mediation.autoencoders.places import Place
from mediation.parameters import sha256

ACTIVATIONS = ("topk", "batch_topk")
_KIND = "mediation.SparseAutoencoder/1"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class SparseAutoencoder(nn.Module):
    """Reads an activation as few latents, each the amount of one direction (Tinaz et al. 2025, arXiv:2504.15473).

    With s the scale, x the activation, b a bias that both sides share, and unit rows in the decoder W_dec,

        z = TopK(ReLU(W_enc (x / s − b) + c)),    x̂ = s (zᵀ W_dec + b)

    where TopK keeps the k largest latents of each position. BatchTopK (Bussmann et al. 2024, arXiv:2412.06410) trains
    by keeping the k n largest of n positions together, and then keeps those above a threshold that does the same on
    average. The paper has no c, and neither has what is trained here: it stays 0 unless a file of others brings one.

    Args:
        n_features: width of the activations.
        n_latents: how many directions there are.
        k: latents that are active at a position, or on average.
        activation: "topk" or "batch_topk".
        place: what it reads in a pipeline; None if it was made for activations of unknown origin.
        seed: of the initial directions; encoder and decoder begin alike.
        metadata: anything worth keeping, as plain JSON; training adds how it went.

    Attributes:
        encoder: W_enc, (latent, feature).
        decoder: W_dec, (latent, feature), with rows of norm 1.
        bias: b, (feature,).
        latent_bias: c, (latent,).
        scale: s, a scalar.
        threshold: below which latents are not active, for "batch_topk".

    Raises:
        ValueError: if a size is not positive, k exceeds the latents, or the activation is unknown.

    Example:
        >>> sae = SparseAutoencoder(n_features=4, n_latents=8, k=2)
        >>> int((sae.encode(torch.ones(3, 4)) > 0).sum(-1).max())
        2
        >>> sae(torch.ones(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        n_features: int,
        n_latents: int,
        k: int,
        *,
        activation: str = "topk",
        place: Place | None = None,
        seed: int = 0,
        metadata: Mapping | None = None,
    ):
        super().__init__()
        if n_features < 1 or not 1 <= k <= n_latents:
            raise ValueError(
                f"an autoencoder has at least one feature, and k of its latents are active, 1 <= k <= n_latents; got"
                f" n_features={n_features}, n_latents={n_latents}, k={k}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.n_features, self.n_latents, self.k, self.activation = n_features, n_latents, k, activation
        self.place, self.metadata = place, dict(metadata or {})
        directions = torch.randn(n_latents, n_features, generator=torch.Generator().manual_seed(seed))
        directions = F.normalize(directions, dim=1)
        self.encoder = nn.Parameter(directions.clone())
        self.decoder = nn.Parameter(directions)
        self.bias = nn.Parameter(torch.zeros(n_features))
        self.register_buffer("latent_bias", torch.zeros(n_latents))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))

    def normalize(self, activations: torch.Tensor) -> torch.Tensor:
        """Activations divided by the scale, in the autoencoder's dtype and on its device."""
        return activations.to(self.encoder) / self.scale

    def encode(self, activations: torch.Tensor) -> torch.Tensor:
        """z, (…, latent), of activations (…, feature).

        Raises:
            ValueError: if the activations are of another width.
        """
        if activations.shape[-1] != self.n_features:
            raise ValueError(f"expected activations with {self.n_features} features, got {tuple(activations.shape)}")
        active = F.linear(self.normalize(activations) - self.bias, self.encoder, self.latent_bias).relu()
        if self.activation == "batch_topk":
            return active * (active >= self.threshold)
        values, latents = active.topk(self.k, dim=-1)
        return torch.zeros_like(active).scatter(-1, latents, values)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """x̂, (…, feature), of latents (…, latent)."""
        return self.scale * (latents @ self.decoder + self.bias)

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """x̂ of activations (…, feature)."""
        return self.decode(self.encode(activations))

    def difference(self, changed: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """By how much the reconstruction moves when latents are changed, which is 0 exactly where they are not.

        Added to an activation, it changes what the latents say and keeps what the reconstruction misses:
        x + decode(z') − decode(z).

        Example:
            >>> sae = SparseAutoencoder(n_features=4, n_latents=8, k=2)
            >>> z = sae.encode(torch.ones(1, 4))
            >>> bool((sae.difference(z, z) == 0).all())
            True
        """
        return self.scale * ((changed - latents) @ self.decoder)

    def check_latents(self, latents: Iterable[int]) -> list[int]:
        """The numbers of some of its latents, as a list.

        Raises:
            TypeError: if they are not integers.
            ValueError: if there are none, or one is named twice, or does not exist.

        Example:
            >>> SparseAutoencoder(n_features=4, n_latents=8, k=2).check_latents(range(2, 4))
            [2, 3]
        """
        given = list(latents)
        try:
            chosen = [operator.index(latent) for latent in given]
        except TypeError as error:
            raise TypeError(f"latents are named by integers, from 0 to {self.n_latents - 1}, got {given}") from error
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= latent < self.n_latents for latent in chosen):
            raise ValueError(f"expected different integers from 0 to {self.n_latents - 1}, at least one, got {chosen}")
        return chosen

    @property
    def config(self) -> dict:
        """All but the weights, as plain JSON."""
        return {
            "n_features": self.n_features,
            "n_latents": self.n_latents,
            "k": self.k,
            "activation": self.activation,
            "place": None if self.place is None else self.place.as_json(),
            "metadata": self.metadata,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, in hexadecimal, by which a dictionary knows its autoencoder."""
        found = {name: sha256(tensor.float()) for name, tensor in self.state_dict().items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def extra_repr(self) -> str:
        """What `repr` says of it."""
        where = "" if self.place is None else f", {self.place}"
        return f"{self.n_features} features, {self.n_latents} latents, {self.activation}, k={self.k}{where}"

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes model.safetensors, which has the configuration in its header, and config.json, the same to be read.

        Example:
            >>> import tempfile
            >>> sae = SparseAutoencoder(n_features=4, n_latents=8, k=2, place=Place("unet.mid.0"))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     sae.save_pretrained(folder)
            ...     again = SparseAutoencoder.from_pretrained(folder)
            >>> again.place.site, torch.equal(again.encoder, sae.encoder)
            ('unet.mid.0', True)
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensorfiles.write(folder / _WEIGHTS, tensors, {"config": self.config}, _KIND)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, place: Place | None = None) -> "SparseAutoencoder":
        """Reads what `save_pretrained` wrote, or a folder of SAeUron or of sdxl-unbox.

        Args:
            folder: the folder.
            place: what it reads, in place of what the file says; folders of others do not say it.

        Returns:
            The autoencoder, on the CPU, its weights frozen.

        Raises:
            FileNotFoundError: if the folder has none of the known files.
            ValueError: if a file is damaged, or the autoencoder is of a kind that this class cannot be, and why; or if
                `place` reads something else than it was trained on.
        """
        folder = pathlib.Path(folder)
        if (folder / _WEIGHTS).exists():
            tensors, header = tensorfiles.read(folder / _WEIGHTS, _KIND)
            config = header["config"]
            if config["place"] is not None:
                config["place"] = Place(**config["place"])
                config["reads"] = config["place"].reads
        else:
            config, tensors = checkpoints.read(folder)
        reads = config.pop("reads", None)
        if place is not None and reads not in (None, place.reads):
            raise ValueError(
                f"the autoencoder in {folder} was trained on a transformer's {reads}: pass reads={reads!r}"
            )
        sae = cls(**config | ({} if place is None else {"place": place}))
        sae.load_state_dict(tensors)
        return sae.requires_grad_(False)
