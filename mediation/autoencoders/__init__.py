"""Sparse autoencoders of what a denoiser computes: training, reading, naming and changing their latents."""

from mediation.autoencoders.fitting import fit_sae, train_sae
from mediation.autoencoders.mediating import top_latents, trace_latents
from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.observing import observe
from mediation.autoencoders.places import Moment, Place
from mediation.autoencoders.splicing import spliced
from mediation.autoencoders.store import collect_activations, open_activations
from mediation.autoencoders.training import Recipe

__all__ = [
    "Moment",
    "Place",
    "Recipe",
    "SparseAutoencoder",
    "collect_activations",
    "fit_sae",
    "observe",
    "open_activations",
    "spliced",
    "top_latents",
    "trace_latents",
    "train_sae",
]
