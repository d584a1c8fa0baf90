"""Causal mediation analysis of text-to-image diffusion pipelines."""

from mediation.autoencoders import (
    Place,
    Recipe,
    SparseAutoencoder,
    collect_activations,
    fit_sae,
    open_activations,
    top_latents,
    trace_latents,
    train_sae,
)
from mediation.cases import Case, GaussianNoise, ReplaceSubject
from mediation.comparison import compare, contrast
from mediation.components import attribute
from mediation.effects import indirect_effect, summarize, top_sites, total_effect
from mediation.metrics import LPIPS, ClassProbability, CLIPScore, LatentDistance
from mediation.pipelines import load_pipeline
from mediation.plots import plot_bars, plot_effects, plot_images
from mediation.sites import Site, sites
from mediation.textlayers import find_text_layers
from mediation.tracing import trace
from mediation.verification import verification
from mediation.weightscores import Attribution

__all__ = [
    "LPIPS",
    "Attribution",
    "CLIPScore",
    "Case",
    "ClassProbability",
    "GaussianNoise",
    "LatentDistance",
    "Place",
    "Recipe",
    "ReplaceSubject",
    "Site",
    "SparseAutoencoder",
    "attribute",
    "collect_activations",
    "compare",
    "contrast",
    "find_text_layers",
    "fit_sae",
    "indirect_effect",
    "load_pipeline",
    "open_activations",
    "plot_bars",
    "plot_effects",
    "plot_images",
    "sites",
    "summarize",
    "top_latents",
    "top_sites",
    "total_effect",
    "trace",
    "trace_latents",
    "train_sae",
    "verification",
]
