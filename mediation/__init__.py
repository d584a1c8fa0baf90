"""Causal mediation analysis of text-to-image diffusion pipelines."""

from mediation.autoencoders import (
    Place,
    Recipe,
    SparseAutoencoder,
    collect_activations,
    concept_dictionaries,
    concept_dictionary,
    concept_labels,
    concept_latents,
    embed_latents,
    emergence,
    fit_sae,
    open_activations,
    open_dictionary,
    predict_layout,
    save_dictionary,
    score_latents,
    summarize_emergence,
    top_latents,
    top_strip,
    trace_latents,
    train_sae,
    write_sheet,
)
from mediation.cases import Case, GaussianNoise, ReplaceSubject, ZeroSubject
from mediation.comparison import compare, contrast
from mediation.components import attribute
from mediation.distances import LPIPS, ImageMSE, LatentDistance
from mediation.effects import indirect_effect, summarize, top_sites, total_effect
from mediation.metrics import ClassProbability, CLIPScore
from mediation.pipelines import load_pipeline
from mediation.plots import plot_bars, plot_effects, plot_emergence, plot_images
from mediation.sites import Site, neighbours, sites
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
    "ImageMSE",
    "LatentDistance",
    "Place",
    "Recipe",
    "ReplaceSubject",
    "Site",
    "SparseAutoencoder",
    "ZeroSubject",
    "attribute",
    "collect_activations",
    "compare",
    "concept_dictionaries",
    "concept_dictionary",
    "concept_labels",
    "concept_latents",
    "contrast",
    "embed_latents",
    "emergence",
    "find_text_layers",
    "fit_sae",
    "indirect_effect",
    "load_pipeline",
    "neighbours",
    "open_activations",
    "open_dictionary",
    "plot_bars",
    "plot_effects",
    "plot_emergence",
    "plot_images",
    "predict_layout",
    "save_dictionary",
    "score_latents",
    "sites",
    "summarize",
    "summarize_emergence",
    "top_latents",
    "top_sites",
    "top_strip",
    "total_effect",
    "trace",
    "trace_latents",
    "train_sae",
    "verification",
    "write_sheet",
]
