"""Units: one suite and the edits that are judged by it. A unit is run at once, and saved under its name."""

import dataclasses
import functools
import json
from collections.abc import Mapping

import editing
from benchmarks.reproduce.edits.recipes import Recipe
from editing.suites import ROLES, Suite

# Concepts that recipes are chosen by, and others, sources and targets alike, that results are reported on.
TRAINING = {"style": {"flat": "fluent", "fluent": "flat"}, "object": {"panda": "fox", "guitar": "key"}}
REPORTED = {
    "style": {"ink": "noto", "twemoji": "noto"},
    "object": {"cat": "dog", "rocket": "car", "pizza": "cake"},
    "background": {"red": "blue", "green": "yellow"},
    "count": {"two": "three", "three": "one"},
    "viewpoint": {"close up": "distant view", "distant view": "close up"},
    "pose": {"upside down": "upright"},
    "fact": {"the mascot": "cat", "the team logo": "castle", "the lucky charm": "snowman", "the royal pet": "lion"},
}
# Edited together, the first n of them; what is left of each factor are targets and bystanders.
TOGETHER = {
    "cat": "dog", "ink": "noto", "rocket": "car", "red": "blue", "the mascot": "lion", "pizza": "cake", "frog": "dog",
    "flat": "noto", "guitar": "key", "green": "blue", "tree": "cake", "snail": "dog", "the team logo": "car",
    "crown": "key", "whale": "dog", "banana": "cake", "turtle": "lion", "fluent": "twemoji", "balloon": "key",
    "yellow": "white", "castle": "car", "carrot": "cake", "the lucky charm": "dog", "penguin": "lion", "robot": "car",
    "mushroom": "cake", "rabbit": "dog", "sunflower": "key", "purple": "white", "umbrella": "car", "cactus": "key",
    "snowman": "lion", "apple": "cake", "the royal pet": "lion", "fox": "dog", "ghost": "key", "doughnut": "cake",
    "butterfly": "lion", "airplane": "car", "grapes": "cake",
}  # fmt: skip
COUNTS = (1, 2, 5, 10, 20, 40)
EDIT_ROLES = tuple(role for role in ROLES if role != "quality")
MOST_TRAINING_PROMPTS = 12  # of each role and source
_TRAINING_SEED, _REPORTED_SEED = 1, 2


@dataclasses.dataclass(frozen=True)
class Unit:
    """A suite, and the edits that are judged by it.

    Attributes:
        experiment: what it belongs to.
        name: unique in the experiment.
        attribute: what is edited: a key of `REPORTED`, or mixed.
        pairs: source concept -> target concept, edited together.
        recipes: by the names that results have.
        n: prompts for each role and source.
        roles: of the prompts.
        seed: of the prompts, and of the noise.
        keeps_pictures: whether a sheet of pictures is saved.
    """

    experiment: str
    name: str
    attribute: str
    pairs: Mapping[str, str]
    recipes: Mapping[str, Recipe]
    n: int
    roles: tuple[str, ...]
    seed: int
    keeps_pictures: bool = False

    @property
    def group(self) -> str:
        """What it is reported under: its attribute, or how many concepts are edited at once."""
        return f"{len(self.pairs)} at once" if self.attribute == "mixed" else self.attribute

    def suite(self) -> Suite:
        """The prompts; where results are reported, none that a recipe was chosen by is among them."""
        avoided = () if self.seed == _TRAINING_SEED else _training_prompts()
        drawn = editing.emoji_suite(self.pairs, n=self.n, seed=self.seed, avoid=avoided)
        return Suite([trial for trial in drawn if trial.role in self.roles])

    def describe(self) -> dict:
        """All that decides on the result, but for the model and the sampler, as plain JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def training_units(experiment: str, recipes: Mapping[str, Mapping[str, Recipe]], n: int) -> list[Unit]:
    """Each training pair by itself.

    Args:
        experiment: its name.
        recipes: attribute -> recipes by name.
        n: prompts for each role.

    Raises:
        ValueError: if n is so large that reported prompts could be among these.
    """
    if n > MOST_TRAINING_PROMPTS:
        raise ValueError(f"recipes are chosen by at most {MOST_TRAINING_PROMPTS} prompts of each role, got {n}")
    return [
        Unit(experiment, f"{attribute}-{source}", attribute, {source: target}, chosen, n, EDIT_ROLES, _TRAINING_SEED)
        for attribute, chosen in recipes.items()
        for source, target in TRAINING[attribute].items()
    ]


def reported_units(
    experiment: str,
    recipes: Mapping[str, Mapping[str, Recipe]],
    n: int,
    *,
    roles: tuple[str, ...] = ROLES,
    n_pairs: int | None = None,
    keeps_pictures: bool = False,
) -> list[Unit]:
    """Each reported pair by itself, or the first `n_pairs` of every attribute; else as `training_units`."""
    options = (n, roles, _REPORTED_SEED, keeps_pictures)
    return [
        Unit(experiment, f"{attribute}-{source}", attribute, {source: target}, chosen, *options)
        for attribute, chosen in recipes.items()
        for source, target in list(REPORTED[attribute].items())[:n_pairs]
    ]


def counted_units(experiment: str, recipes: Mapping[str, Recipe]) -> list[Unit]:
    """The first 1, 2, 5, … concepts of `TOGETHER`, edited at once, with at least twenty prompts of each role."""
    return [
        Unit(
            experiment=experiment,
            name=str(count),
            attribute="mixed",
            pairs=dict(list(TOGETHER.items())[:count]),
            recipes=recipes,
            n=max(1, 20 // count),
            roles=EDIT_ROLES,
            seed=_REPORTED_SEED,
        )
        for count in COUNTS
    ]


@functools.cache
def _training_prompts() -> frozenset[str]:
    """Every prompt that a recipe may have been chosen by."""
    suites = [
        editing.emoji_suite({source: target}, n=MOST_TRAINING_PROMPTS, seed=_TRAINING_SEED)
        for pairs in TRAINING.values()
        for source, target in pairs.items()
    ]
    return frozenset(trial.prompt for suite in suites for trial in suite if trial.role in EDIT_ROLES)
