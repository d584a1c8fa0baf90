"""Sparse autoencoders of what a denoiser computes: training, reading, naming and changing their latents."""

from mediation.autoencoders.concepts import concept_labels, concept_latents, embed_latents, score_latents
from mediation.autoencoders.dictionary import concept_dictionaries, concept_dictionary
from mediation.autoencoders.files import open_dictionary, save_dictionary
from mediation.autoencoders.fitting import fit_sae, train_sae
from mediation.autoencoders.layouts import emergence, summarize_emergence
from mediation.autoencoders.mediating import top_latents, trace_latents
from mediation.autoencoders.model import SparseAutoencoder
from mediation.autoencoders.observing import observe
from mediation.autoencoders.places import Moment, Place
from mediation.autoencoders.prediction import predict_layout
from mediation.autoencoders.sheets import top_strip, write_sheet
from mediation.autoencoders.splicing import spliced
from mediation.autoencoders.store import collect_activations, open_activations
from mediation.autoencoders.training import Recipe

__all__ = [
    "Moment",
    "Place",
    "Recipe",
    "SparseAutoencoder",
    "collect_activations",
    "concept_dictionaries",
    "concept_dictionary",
    "concept_labels",
    "concept_latents",
    "embed_latents",
    "emergence",
    "fit_sae",
    "observe",
    "open_activations",
    "open_dictionary",
    "predict_layout",
    "save_dictionary",
    "score_latents",
    "spliced",
    "summarize_emergence",
    "top_latents",
    "top_strip",
    "trace_latents",
    "train_sae",
    "write_sheet",
]
