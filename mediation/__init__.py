"""Causal mediation analysis of text-to-image diffusion pipelines."""

from mediation.cases import Case, GaussianNoise, ReplaceSubject
from mediation.effects import indirect_effect, summarize, top_sites, total_effect
from mediation.metrics import ClassProbability, CLIPScore, LatentDistance
from mediation.pipelines import load_pipeline
from mediation.plots import plot_effects
from mediation.sites import Site, sites
from mediation.tracing import trace

__all__ = [
    "CLIPScore",
    "Case",
    "ClassProbability",
    "GaussianNoise",
    "LatentDistance",
    "ReplaceSubject",
    "Site",
    "indirect_effect",
    "load_pipeline",
    "plot_effects",
    "sites",
    "summarize",
    "top_sites",
    "total_effect",
    "trace",
]
