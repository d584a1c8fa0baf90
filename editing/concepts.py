"""What an edit is asked for: source and target concepts, what to preserve, templates and weights."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

TEMPLATES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A whole prompt to preserve: it goes through no template, and all its tokens keep their values, padding apart.

    Attributes:
        text: the prompt; "" is what guidance compares with.
        weight: of each of its tokens, first and end token included.

    Example:
        >>> Prompt("two cats on a mat", weight=0.5)
        Prompt(text='two cats on a mat', weight=0.5)
    """

    text: str
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"a preserved prompt must be a string, got {self.text!r}")
        object.__setattr__(self, "text", self.text.strip())
        object.__setattr__(self, "weight", _weight(self.text, self.weight))


Target = str | dict[str, float]


class Goal(NamedTuple):
    """One concept that is to be read as another, or as the mean of several; what is preserved, as itself."""

    source: str
    shares: dict[str, float]  # of each target in what the source is to be read as; they sum up to 1
    weight: float
    is_edited: bool = False
    is_prompt: bool = False  # and goes through no template

    @property
    def target(self) -> "Target":
        """The target, or several with their shares, as in a request."""
        return next(iter(self.shares)) if len(self.shares) == 1 else self.shares


@dataclasses.dataclass(frozen=True)
class Request:
    """Concepts, and the templates they are put through; building one checks it.

    Attributes:
        pairs: source concept -> target concept, or several with their shares; "" erases the source.
        templates: texts with one "{}" each.
        preserve: concepts that keep their meaning.
        prompts: whole prompts that keep theirs.
        weights: concept, edited or preserved -> weight of each of its keys; 1 where absent.
    """

    pairs: dict[str, Target]
    templates: tuple[str, ...]
    preserve: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    weights: dict[str, float]

    @classmethod
    def of(
        cls,
        pairs: Mapping[str, str | Iterable[str] | Mapping[str, float]],
        templates: Iterable[str] | None,
        preserve: Iterable[str | Prompt],
        weights: Mapping[str, float] | None,
        *,
        any_target: bool = False,
    ) -> "Request":
        """Builds a request from what a user passes; with `any_target`, a target may be empty, or be several.

        Raises:
            TypeError: if something is of another kind than documented.
            ValueError: if a concept is empty, or a template has not exactly one "{}", or a weight is not positive or
                belongs to no concept, or a template or a prompt is given twice.

        Example:
            >>> Request.of({" ink": "noto"}, None, ["cat"], None).pairs
            {'ink': 'noto'}
        """
        for what, mapping in (("pairs", pairs), ("weights", weights or {})):
            if not isinstance(mapping, Mapping):
                example = '{"ink": "noto"}' if what == "pairs" else '{"ink": 2.0}'
                raise TypeError(f"{what} must be a mapping such as {example}, got {type(mapping).__name__}")
        if not pairs:
            raise ValueError('no concept to edit was given: pass pairs such as {"ink": "noto"}')
        read = _any_target if any_target else functools.partial(_concept, what="a target")
        edited = {_concept(source, "a source"): read(target) for source, target in pairs.items()}
        if len(edited) < len(pairs):
            raise ValueError(f"a source concept was given twice: {', '.join(map(repr, pairs))}")
        kept = _texts(preserve, "preserve")
        prompts = tuple(entry for entry in kept if isinstance(entry, Prompt))
        if len({prompt.text for prompt in prompts}) < len(prompts):
            raise ValueError("a prompt would be preserved twice: give it a weight to make it count more")
        preserved = tuple(_concept(entry, "a preserved concept") for entry in kept if not isinstance(entry, Prompt))
        weighted = {
            _concept(concept, "a weighted concept"): _weight(concept, w) for concept, w in (weights or {}).items()
        }
        for concept in weighted:
            if concept not in edited and concept not in preserved:
                raise ValueError(f"weights name {concept!r}, which is neither a source concept nor preserved")
        return cls(edited, checked_templates(templates), preserved, prompts, weighted)

    def __add__(self, other: "Request") -> "Request":
        """Both requests at once, for the same templates.

        Raises:
            ValueError: if a concept is a source in both.
        """
        if twice := self.pairs.keys() & other.pairs.keys():
            raise ValueError(f"a source concept was given twice: {', '.join(map(repr, twice))}")
        pairs, weights = self.pairs | other.pairs, self.weights | other.weights
        return Request(pairs, self.templates, self.preserve + other.preserve, self.prompts + other.prompts, weights)

    def goals(self) -> Iterator[Goal]:
        """The edited concepts in the order given, then the preserved ones, then the preserved prompts."""
        for source, target in self.pairs.items():
            shares = {target: 1.0} if isinstance(target, str) else target
            yield Goal(source, shares, self.weights.get(source, 1.0), is_edited=True)
        for concept in self.preserve:
            yield Goal(concept, {concept: 1.0}, self.weights.get(concept, 1.0))
        for prompt in self.prompts:
            yield Goal(prompt.text, {prompt.text: 1.0}, prompt.weight, is_prompt=True)

    def describe(self) -> dict:
        """The request as plain JSON, for an edit's metadata."""
        return {
            "pairs": self.pairs,
            "templates": list(self.templates),
            "preserve": list(self.preserve),
            "preserve_prompts": {prompt.text: prompt.weight for prompt in self.prompts},
            "weights": self.weights,
        }


def checked_templates(templates: Iterable[str] | None) -> tuple[str, ...]:
    """Returns the templates that a user passed, the paper's four for None, or says why they are none.

    Raises:
        TypeError: if they are no strings.
        ValueError: if there are none, or one has not exactly one "{}", or is given twice.
    """
    chosen = TEMPLATES if templates is None else _texts(templates, "templates")
    if not chosen:
        raise ValueError('no template was given: pass None for the paper\'s four, or texts with one "{}" each')
    for template in chosen:
        if not isinstance(template, str):
            raise TypeError(f"a template must be a string, got {template!r}")
        if template.count("{}") != 1:
            raise ValueError(f'a template has exactly one "{{}}" where the concept goes, got {template!r}')
        if chosen.count(template) > 1:
            raise ValueError(f"the template {template!r} was given twice: give weights to make a concept count more")
    return chosen


def split(template: str) -> tuple[str, str]:
    """What stands before and after a template's "{}"."""
    before, after = template.split("{}")
    return before, after


def _concept(text: str, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a string, got {text!r}")
    if not text.strip():
        raise ValueError(f"{what} is empty: name a concept in words")
    return text.strip()


def _any_target(target: str | Iterable[str] | Mapping[str, float]) -> Target:
    """One target, which may be empty, or several with shares that sum up to 1."""
    if isinstance(target, str) or not isinstance(target, Iterable):
        return target if target == "" else _concept(target, "a target")
    named = list(target.items() if isinstance(target, Mapping) else ((one, 1.0) for one in target))
    weights = {_concept(concept, "a target"): _weight(concept, weight) for concept, weight in named}
    if len(weights) < len(named) or not named:
        raise ValueError(f"several targets are given once each, and at least one; got {target!r}")
    total = sum(weights.values())
    return next(iter(weights)) if len(weights) == 1 else {one: weight / total for one, weight in weights.items()}


def _texts(texts: Iterable, what: str) -> tuple:
    if isinstance(texts, str | Prompt) or not isinstance(texts, Iterable):
        raise TypeError(f"{what} must be a list of strings, got {texts!r}")
    return tuple(texts)


def _weight(concept: str, weight: float) -> float:
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
        raise TypeError(f"the weight of {concept!r} must be a number, got {weight!r}")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight of {concept!r} must be positive and finite, got {weight}")
    return float(weight)
