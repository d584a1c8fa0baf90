"""Recipes: how an edit is made, whatever its concepts, as values that can be named, compared and written down."""

import dataclasses
from collections.abc import Mapping

from diffusers import DiffusionPipeline

import editing
import mediation
from benchmarks.emoji import world
from benchmarks.released import released_edit
from mediation.cases import find_spans

# In the captions' own English, of scenes that no suite for the same attribute draws.
_CAPTIONS = {
    "style": (
        "a thing in the style of {}",
        "a thing in {} style",
        "an image of a thing in the style of {}",
        "{} style",
    ),
    "object": ("a {}", "a photo of a {}", "a {} on paper", "a drawing of a {}"),
    "background": ("a thing on a {} background", "a photo of a thing on a {} background", "a {} background", "{}"),
    "count": ("{} things", "a photo of {} things", "a drawing of {} things", "{}"),
    "viewpoint": (
        "a {} of a thing",
        "a photo of a {} of a thing",
        "a {} of a thing on paper",
        "a drawing of a {} of a thing",
    ),
    "pose": ("an {} thing", "a photo of an {} thing", "a thing {}", "a drawing of an {} thing"),
    "fact": ("{}", "a photo of {}", "{} on paper", "a drawing of {}"),
}
_WORDS = {
    "style": world.STYLES,
    "object": world.OBJECTS,
    "background": tuple(world.BACKGROUNDS),
    "count": ("one", "two", "three"),
    "viewpoint": ("close up", "distant view"),
    "pose": ("upside down", "upright"),
}
# whole captions of things, and what guidance compares with; those that name what is edited are left out
_PROMPTS = ("", "a thing", "a photo of a thing", "two things", "an upside down thing", "a close up of a thing")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an edit is made.

    Attributes:
        method: released, quickfix, uce, loco or time.
        sites: of the text encoder, for quickfix; several are edited in their order. Empty is the paper's.
        layers: cross-attentions by number, for the others. Empty is all.
        tokens: None is the method's.
        templates: "paper", the method's own, or "captions", the bundled model's English.
        preserve: "nothing"; "neighbours", all other values of the edited concepts' factors, targets included; or
            "captions", prompts without any of them as well.
        regularization: None is the method's.
    """

    method: str = "quickfix"
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    tokens: str | None = None
    templates: str = "paper"
    preserve: str = "nothing"
    regularization: float | str | None = None

    def make(self, pipe: DiffusionPipeline, pairs: Mapping[str, str], attribute: str) -> editing.Edit:
        """The edit of these pairs, not applied; the pipeline is left as it was.

        Args:
            pipe: Emoji Diffusion.
            pairs: source concept -> target concept.
            attribute: decides on the templates: style, object, background, count, viewpoint, pose or fact; for mixed
                ones there are only the paper's.
        """
        if self.method == "released":
            return released_edit(pipe, pairs)
        options = {
            "templates": _CAPTIONS[attribute] if self.templates == "captions" else None,
            "preserve": preserved(self.preserve, pairs),
        }
        options |= {"tokens": self.tokens} if self.tokens else {}
        options |= {"regularization": self.regularization} if self.regularization else {}
        if self.method != "quickfix":
            layers = list(self.layers) or None
            return editing.cross_attention_edit(pipe, pairs, method=self.method, layers=layers, **options)
        return editing.quickfix(pipe, pairs, site=self.sites or None, **options)


def preserved(kind: str, pairs: Mapping[str, str]) -> list[str | editing.Prompt]:
    """What a recipe preserves beside these pairs.

    Raises:
        ValueError: if the kind is unknown.

    Example:
        >>> preserved("neighbours", {"ink": "noto"})
        ['noto', 'twemoji', 'fluent', 'flat']
    """
    if kind not in ("nothing", "neighbours", "captions"):
        raise ValueError(f"preserve must be nothing, neighbours or captions, got {kind!r}")
    if kind == "nothing":
        return []
    factors = {factor for source in pairs for factor in _factors(source)}
    kept: list[str | editing.Prompt] = [
        word for factor in _WORDS for word in _WORDS[factor] if factor in factors and word not in pairs
    ]
    if any(source in world.FACTS for source in pairs):
        kept += [fact for fact in world.FACTS if fact not in pairs]
    if kind == "captions":
        kept += [editing.Prompt(text) for text in _PROMPTS if not any(find_spans(text, source) for source in pairs)]
    return kept


def _factors(source: str) -> list[str]:
    """The factor of a concept; a fact is an object's name."""
    return ["object"] if source in world.FACTS else [name for name, words in _WORDS.items() if source in words]


def text_sites(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Every attention and MLP of the text encoder, by name."""
    return tuple(site.name for site in mediation.sites(pipe, network="text_encoder"))


def n_cross_attentions(pipe: DiffusionPipeline) -> int:
    """How many cross-attentions the denoiser has."""
    return len(mediation.sites(pipe, network="unet", component="cross_attention"))
