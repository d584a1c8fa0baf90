"""The experiments: which units each of them is, some with recipes that others have chosen."""

import dataclasses
from collections.abc import Callable, Mapping

import xarray
from diffusers import DiffusionPipeline

from benchmarks.reproduce.edits.recipes import Recipe, n_cross_attentions, text_sites
from benchmarks.reproduce.edits.scoring import pooled, ranked
from benchmarks.reproduce.edits.units import (
    EDIT_ROLES,
    MOST_TRAINING_PROMPTS,
    REPORTED,
    Unit,
    counted_units,
    reported_units,
    training_units,
)

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ATTRIBUTES = ("style", "object")
_TOKENS = ("last_subject", "from_subject")
_N_FINALISTS = 4
_N_POSES = 40  # prompts of the only pair, of which few pictures show the source

# experiment -> group -> report
Reports = Mapping[str, Mapping[str, xarray.Dataset]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question put to edits.

    Attributes:
        question: in words.
        units: what is run, given the pipeline and the reports of the experiments that it needs.
        needs: those experiments.
    """

    question: str
    units: Callable[[DiffusionPipeline, Reports], list[Unit]]
    needs: tuple[str, ...] = ()


def _windows(pipe: DiffusionPipeline, _reports: Reports) -> list[Unit]:
    return training_units("windows", dict.fromkeys(_ATTRIBUTES, _window_recipes(pipe)), 4)


def _search(pipe: DiffusionPipeline, _reports: Reports) -> list[Unit]:
    return training_units("search", dict.fromkeys(_ATTRIBUTES, _candidates(pipe)), 4)


def _finalists(pipe: DiffusionPipeline, reports: Reports) -> list[Unit]:
    recipes = {attribute: _finalist_recipes(pipe, reports, attribute) for attribute in _ATTRIBUTES}
    return training_units("finalists", recipes, MOST_TRAINING_PROMPTS)


def _best(pipe: DiffusionPipeline, reports: Reports) -> list[Unit]:
    recipes = {}
    for attribute in _ATTRIBUTES:
        (winner, *_) = ranked(reports["finalists"][attribute])
        best = _finalist_recipes(pipe, reports, attribute)[winner]
        recipes[attribute] = {"fixed": Recipe(), "preserving": Recipe(preserve="neighbours"), "best": best}
    return reported_units("best", recipes, 25, keeps_pictures=True)


def _methods(pipe: DiffusionPipeline, reports: Reports) -> list[Unit]:
    recipes = _published(pipe, reports)
    attributes = [attribute for attribute in REPORTED if attribute not in ("fact", "pose")]
    units = reported_units("methods", dict.fromkeys(attributes, recipes), 10, n_pairs=2)
    return units + reported_units("methods", {"pose": recipes}, _N_POSES)


def _facts(pipe: DiffusionPipeline, reports: Reports) -> list[Unit]:
    return reported_units("facts", {"fact": _published(pipe, reports)}, 8)


def _layers(pipe: DiffusionPipeline, _reports: Reports) -> list[Unit]:
    recipes = {
        f"{site}, {tokens}": Recipe(sites=(site,), tokens=tokens, templates="captions")
        for tokens in _TOKENS
        for site in text_sites(pipe)
    }
    options = {"roles": EDIT_ROLES, "n_pairs": 1}
    attributes = [attribute for attribute in REPORTED if attribute != "pose"]
    units = reported_units("layers", dict.fromkeys(attributes, recipes), 10, **options)
    return units + reported_units("layers", {"pose": recipes}, _N_POSES, **options)


def _lambdas(_pipe: DiffusionPipeline, _reports: Reports) -> list[Unit]:
    kinds = {
        "quickfix": Recipe(templates="captions", preserve="neighbours"),
        "uce": Recipe("uce", preserve="neighbours"),
    }
    recipes = {
        f"{name} {value:g}": dataclasses.replace(recipe, regularization=value)
        for name, recipe in kinds.items()
        for value in LAMBDAS
    }
    return reported_units("lambdas", dict.fromkeys(_ATTRIBUTES, recipes), 10, roles=EDIT_ROLES, n_pairs=1)


def _concepts(_pipe: DiffusionPipeline, _reports: Reports) -> list[Unit]:
    recipes = {
        "fixed": Recipe(),
        "preserving": Recipe(preserve="neighbours"),
        "uce": Recipe("uce", preserve="neighbours"),
    }
    return counted_units("concepts", recipes)


def _published(pipe: DiffusionPipeline, reports: Reports) -> dict[str, Recipe]:
    """The papers' methods, with their own templates; LocoEdit at the layers that did best on training concepts."""
    (window, *_) = ranked(pooled(list(reports["windows"].values())))
    return {
        "released": Recipe("released"),
        "fixed": Recipe(),
        "fixed, from_subject": Recipe(tokens="from_subject"),
        "preserving": Recipe(preserve="neighbours"),
        "uce": Recipe("uce", preserve="neighbours"),
        "loco": _window_recipes(pipe)[window],
        "time": Recipe("time"),
    }


def _window_recipes(pipe: DiffusionPipeline) -> dict[str, Recipe]:
    """LocoEdit of every two consecutive cross-attentions."""
    return {
        f"layers {first} and {first + 1}": Recipe("loco", layers=(first, first + 1))
        for first in range(n_cross_attentions(pipe) - 1)
    }


def _candidates(pipe: DiffusionPipeline) -> dict[str, Recipe]:
    """What the best recipe is chosen from."""
    sites = text_sites(pipe)
    attentions, mlps = (tuple(s for s in sites if s.endswith(kind)) for kind in ("self_attention", "mlp"))
    places = {
        "first attention": attentions[:1],
        "attentions": attentions,
        "first MLP": mlps[:1],
        "MLPs": mlps,
        "all of the text encoder": sites,
    }
    found = {}
    for preserve in ("neighbours", "captions"):
        shared = {"templates": "captions", "preserve": preserve}
        for tokens in _TOKENS:
            for place, chosen in places.items():
                found[f"{place}, {tokens}, {preserve}"] = Recipe(sites=chosen, tokens=tokens, **shared)
        for tokens in (*_TOKENS, "all"):
            found[f"uce, {tokens}, {preserve}"] = Recipe("uce", tokens=tokens, **shared)
    return found


def _finalist_recipes(pipe: DiffusionPipeline, reports: Reports, attribute: str) -> dict[str, Recipe]:
    """The best candidates for an attribute, with their own lambda and with one found without pictures."""
    candidates = _candidates(pipe)
    found = {}
    for name in ranked(reports["search"][attribute])[:_N_FINALISTS]:
        found[name] = candidates[name]
        found[f"{name}, auto"] = dataclasses.replace(candidates[name], regularization="auto")
    return found


# In this order, so that each comes after those that it needs.
EXPERIMENTS = {
    "windows": Experiment("At which two cross-attentions does LocoEdit do best, on training concepts?", _windows),
    "methods": Experiment("What do the papers' methods do to each attribute?", _methods, ("windows",)),
    "facts": Experiment("What do they do to facts?", _facts, ("windows",)),
    "layers": Experiment("Does the place that a causal map shows edit best?", _layers),
    "lambdas": Experiment("How strongly should an edit be held back?", _lambdas),
    "concepts": Experiment("How many concepts can be edited at once?", _concepts),
    "search": Experiment("Which recipes do best on training concepts?", _search),
    "finalists": Experiment("Which of the best does best on more training prompts?", _finalists, ("search",)),
    "best": Experiment("What does the chosen recipe do to other concepts?", _best, ("search", "finalists")),
}


def with_needs(names: list[str]) -> list[str]:
    """The experiments and all that they need, in the order in which they can be run.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> with_needs(["facts"])
        ['windows', 'facts']
    """
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    needed = {need for name in names for need in EXPERIMENTS[name].needs}
    return [name for name in EXPERIMENTS if name in names or name in needed]
