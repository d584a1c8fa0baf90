"""Which weights are set to 0, as values that can be named, compared and written down; and the units that judge them."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy
import torch
from diffusers import DiffusionPipeline

import editing
import mediation
from benchmarks.emoji import world
from benchmarks.reproduce.edits.recipes import Recipe
from benchmarks.reproduce.edits.units import EDIT_ROLES, Unit
from editing.ablation import CONTROLS, control

OBJECTIVES = ("erase", "amplify")
RATIOS = (0.001, 0.005, 0.02)  # of all weights that are scored
N_PROMPTS = 12  # of each role
_SEED = 3  # of prompts and noise; another one than recipes of edits were chosen by


@dataclasses.dataclass(frozen=True)
class Concept:
    """What is erased, or amplified.

    Attributes:
        name: as suites call it.
        attribute: its factor.
        target: what Diff-QuickFix puts in its place, and pictures are judged for.
        prompt: what scores are computed for.
    """

    name: str
    attribute: str
    target: str
    prompt: str


CONCEPTS = (Concept("ink", "style", "noto", "ink style"), Concept("cat", "object", "dog", "a cat"))
# The model draws the former nearly always, and these less often: there is something to bring out.
WEAK_CONCEPTS = (
    Concept("fluent", "style", "noto", "fluent style"),
    Concept("upside down", "pose", "upright", "an upside down thing"),
)
BY_OBJECTIVE = {"erase": CONCEPTS, "amplify": WEAK_CONCEPTS}


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
        found = self._scored(pipe)
        if self.scores != "cad":
            found = control(found, self.scores)
        ablate = editing.cad_erase if self.objective == "erase" else editing.cad_amplify
        return ablate(found, ratio=self.ratio, per=self.per)

    def _scored(self, pipe: DiffusionPipeline) -> mediation.Attribution:
        return scored(pipe, self.prompt, self.objective, self.num_inference_steps)


@dataclasses.dataclass(frozen=True)
class PictureAblation(Ablation):
    """The same, with scores of pictures that show the concept: one that the model draws need not.

    Attributes:
        factor: the concept's attribute.
        label: the concept.
        n_pictures: rendered scenes of the emoji world.
    """

    factor: str = "style"
    label: str = "fluent"
    n_pictures: int = 8

    def _scored(self, pipe: DiffusionPipeline) -> mediation.Attribution:
        shown = self.factor, self.label, self.n_pictures
        return scored(pipe, self.prompt, self.objective, self.num_inference_steps, shown)


@functools.lru_cache(maxsize=1)  # recipes of one unit share their scores
def scored(
    pipe: DiffusionPipeline,
    prompt: str,
    objective: str,
    num_inference_steps: int,
    shown: tuple[str, str, int] | None = None,
) -> mediation.Attribution:
    """Scores of the feed-forwards of the denoiser, as in the paper; `shown` are arguments of `pictures`, if any."""
    images = {"images": pictures(*shown)} if shown else {}
    return mediation.attribute(pipe, prompt, objective=objective, num_inference_steps=num_inference_steps, **images)


def pictures(factor: str, label: str, n: int) -> torch.Tensor:
    """Rendered scenes of the emoji world in which a factor is so, others at random: (n, 3, 64, 64) in [0, 1].

    Example:
        >>> pictures("pose", "upside down", 2).shape
        torch.Size([2, 3, 64, 64])
    """
    rng, scenes = numpy.random.default_rng(_SEED), []
    while len(scenes) < n:
        scene = world.sample(rng).scene
        if getattr(scene, factor) == label:
            scenes.append(scene)
    return (world.render(scenes, rng) + 1) / 2


def ablation_recipes(concept: Concept, objective: str) -> dict[str, Ablation | Recipe]:
    """CAD and its controls by ratio, CAD as released, and for erasing, Diff-QuickFix beside them."""
    made = Ablation
    if objective == "amplify":
        made = functools.partial(PictureAblation, factor=concept.attribute, label=concept.name)
    recipes: dict[str, Ablation | Recipe] = {
        named(scores, ratio): made(objective, concept.prompt, ratio, scores=scores)
        for ratio in RATIOS
        for scores in ("cad", *CONTROLS)
    }
    recipes["cad per row"] = made(objective, concept.prompt, 0.001, per="row")
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
            for concept in BY_OBJECTIVE[objective]
        ]
        for objective in OBJECTIVES
    }
