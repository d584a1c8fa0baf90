"""Which weights are set to 0, as values that can be named, compared and written down; and the units that judge them."""

import dataclasses
import functools
from collections.abc import Mapping

from diffusers import DiffusionPipeline

import editing
import mediation
from benchmarks.reproduce.edits.recipes import Recipe
from benchmarks.reproduce.edits.units import EDIT_ROLES, Unit
from editing.ablation import CONTROLS, control

OBJECTIVES = ("erase", "amplify")
RATIOS = (0.001, 0.005, 0.02)  # of all weights that are scored
N_PROMPTS = 12  # of each role
_SEED = 3  # of prompts and noise; another one than recipes of edits were chosen by


@dataclasses.dataclass(frozen=True)
class Concept:
    """What is erased and amplified.

    Attributes:
        name: as suites call it.
        attribute: its factor.
        target: what Diff-QuickFix puts in its place.
        prompt: what scores are computed for.
    """

    name: str
    attribute: str
    target: str
    prompt: str


CONCEPTS = (Concept("ink", "style", "noto", "ink style"), Concept("cat", "object", "dog", "a cat"))


@dataclasses.dataclass(frozen=True)
class Ablation:
    """How scores become an edit, by the interface of `edits.recipes.Recipe`.

    Attributes:
        objective: erase or amplify.
        prompt: what scores are computed for.
        ratio: share of the weights that are set to 0.
        per: what the share is of: row, matrix or model.
        scores: "cad", or the control that takes their place.
        num_inference_steps: of the trajectory that is scored.
    """

    objective: str
    prompt: str
    ratio: float
    per: str = "model"
    scores: str = "cad"
    num_inference_steps: int = 50

    def make(self, pipe: DiffusionPipeline, _pairs: Mapping[str, str], _attribute: str) -> editing.Edit:
        """The edit, not applied; scores depend on the prompt alone, and have no target."""
        found = scored(pipe, self.prompt, self.objective, self.num_inference_steps)
        if self.scores != "cad":
            found = control(found, self.scores)
        ablate = editing.cad_erase if self.objective == "erase" else editing.cad_amplify
        return ablate(found, ratio=self.ratio, per=self.per)


@functools.lru_cache(maxsize=1)  # recipes of one unit share their scores
def scored(pipe: DiffusionPipeline, prompt: str, objective: str, num_inference_steps: int) -> mediation.Attribution:
    """Scores of the feed-forwards of the denoiser, as in the paper."""
    return mediation.attribute(pipe, prompt, objective=objective, num_inference_steps=num_inference_steps)


def ablation_recipes(concept: Concept, objective: str) -> dict[str, Ablation | Recipe]:
    """CAD and its controls by ratio, CAD as released, and for erasing, Diff-QuickFix beside them."""
    recipes: dict[str, Ablation | Recipe] = {
        named(scores, ratio): Ablation(objective, concept.prompt, ratio, scores=scores)
        for ratio in RATIOS
        for scores in ("cad", *CONTROLS)
    }
    recipes["cad per row"] = Ablation(objective, concept.prompt, 0.001, per="row")
    if objective == "erase":
        recipes |= {"quickfix": Recipe(), "quickfix, preserving": Recipe(preserve="neighbours")}
    return recipes


def named(scores: str, ratio: float) -> str:
    """What results call an ablation.

    Example:
        >>> named("cad", 0.001)
        'cad 0.001'
    """
    return f"{scores} {ratio:g}"


def ablation_units() -> dict[str, list[Unit]]:
    """Objective -> the units of every concept."""
    return {
        objective: [
            Unit(
                experiment="ablations",
                name=f"{concept.attribute}-{concept.name}-{objective}",
                attribute=concept.attribute,
                pairs={concept.name: concept.target},
                recipes=ablation_recipes(concept, objective),
                n=N_PROMPTS,
                roles=EDIT_ROLES,
                seed=_SEED,
            )
            for concept in CONCEPTS
        ]
        for objective in OBJECTIVES
    }
