"""What an edit is asked for: source and target concepts, concepts to preserve, templates and weights."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

TEMPLATES = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


class Goal(NamedTuple):
    """One concept that is to be read as another; a preserved concept is to be read as itself."""

    source: str
    target: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Request:
    """Concepts, and the templates they are put through; building one checks it.

    Attributes:
        pairs: source concept -> target concept.
        templates: texts with one "{}" each.
        preserve: concepts that keep their meaning.
        weights: concept, edited or preserved -> weight of each of its keys; 1 where absent.
    """

    pairs: dict[str, str]
    templates: tuple[str, ...]
    preserve: tuple[str, ...]
    weights: dict[str, float]

    @classmethod
    def of(
        cls,
        pairs: Mapping[str, str],
        templates: Iterable[str] | None,
        preserve: Iterable[str],
        weights: Mapping[str, float] | None,
    ) -> "Request":
        """Builds a request from what a user passes.

        Raises:
            TypeError: if something is of another kind than documented.
            ValueError: if a concept is empty, or a template has not exactly one "{}", or a weight is not positive or
                belongs to no concept, or a template is given twice.

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
        edited = {_concept(source, "a source"): _concept(target, "a target") for source, target in pairs.items()}
        if len(edited) < len(pairs):
            raise ValueError(f"a source concept was given twice: {', '.join(map(repr, pairs))}")
        preserved = tuple(_concept(concept, "a preserved concept") for concept in _texts(preserve, "preserve"))
        weighted = {
            _concept(concept, "a weighted concept"): _weight(concept, w) for concept, w in (weights or {}).items()
        }
        for concept in weighted:
            if concept not in edited and concept not in preserved:
                raise ValueError(f"weights name {concept!r}, which is neither a source concept nor preserved")
        return cls(edited, _templates(TEMPLATES if templates is None else templates), preserved, weighted)

    def goals(self) -> Iterator[Goal]:
        """The edited concepts in the order given, then the preserved ones."""
        for source, target in [*self.pairs.items(), *((concept, concept) for concept in self.preserve)]:
            yield Goal(source, target, self.weights.get(source, 1.0))

    def check_distinct(self, read: Callable[[str], object]) -> None:
        """Checks that no concept contradicts another, where `read` tells how a text encoder sees a concept.

        Raises:
            ValueError: if a source is its own target, or two sources are one concept, or a concept is to be edited
                and preserved, or preserved twice.
        """
        uses: dict[object, str] = {}
        for source, target in self.pairs.items():
            if (seen := read(source)) == read(target):
                raise ValueError(f"source {source!r} and target {target!r} are the same to the text encoder")
            if seen in uses:
                raise ValueError(f"{uses[seen]!r} and {source!r} are one concept to the text encoder: name one target")
            uses[seen] = source
        for concept in self.preserve:
            if (seen := read(concept)) in uses:
                why = "edited and preserved" if uses[seen] in self.pairs else "preserved twice"
                raise ValueError(f"{concept!r} would be {why}: to the text encoder it is {uses[seen]!r}")
            uses[seen] = concept


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


def _texts(texts: Iterable[str], what: str) -> tuple[str, ...]:
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise TypeError(f"{what} must be a list of strings, got {texts!r}")
    return tuple(texts)


def _templates(templates: Iterable[str]) -> tuple[str, ...]:
    chosen = _texts(templates, "templates")
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


def _weight(concept: str, weight: float) -> float:
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
        raise TypeError(f"the weight of {concept!r} must be a number, got {weight!r}")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight of {concept!r} must be positive and finite, got {weight}")
    return float(weight)
