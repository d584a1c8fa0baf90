"""Closed-form edits of text-to-image models."""

from editing.ablation import cad_amplify, cad_erase
from editing.concepts import Prompt
from editing.crossattention import cross_attention_edit
from editing.edit import Edit, load
from editing.emojisuite import emoji_suite
from editing.evaluation import evaluate
from editing.export import export_pipeline, import_lora
from editing.fitter import Fitter
from editing.plots import plot_evaluation, plot_sheet
from editing.quickfix import quickfix
from editing.regularization import Relative
from editing.scores import summarize_evaluation
from editing.steering import steer
from editing.suites import Suite, Trial
from editing.updates import LowRank, Mixed, Sparse

__all__ = [
    "Edit",
    "Fitter",
    "LowRank",
    "Mixed",
    "Prompt",
    "Relative",
    "Sparse",
    "Suite",
    "Trial",
    "cad_amplify",
    "cad_erase",
    "cross_attention_edit",
    "emoji_suite",
    "evaluate",
    "export_pipeline",
    "import_lora",
    "load",
    "plot_evaluation",
    "plot_sheet",
    "quickfix",
    "steer",
    "summarize_evaluation",
]
