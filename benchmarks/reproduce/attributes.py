"""Cases by attribute: captions of the emoji world, the words in them that state an attribute, and what these mean."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy
import torch

from benchmarks.emoji import world
from mediation import Case, GaussianNoise
from mediation.bundled import AttributeProbe
from mediation.cases import find_spans
from mediation.metrics import DifferentiableMetric

# attribute -> the factor of a scene that it is
FACTORS = {
    "object": "object",
    "style": "style",
    "color": "background",
    "count": "count",
    "viewpoint": "viewpoint",
    "pose": "pose",
    "fact": "object",
}
_COUNTS = {2: "two", 3: "three"}
_VIEWS = {"close up": ("close up",), "distant": ("distant view", "seen from afar")}
_MOST_CASES = 1000  # of one attribute, so that no two attributes share a seed


def make_cases(attribute: str, n: int, draws: int) -> list[tuple[Case, object]]:
    """Cases whose subject states an attribute, each with the label that a probe should read in its clean picture.

    The captions are of scenes that training can show, each occurs once, and the outcome of no run decides which are
    taken. White, one, plain and upright are left out: they are what is drawn if nothing is said.

    Args:
        attribute: a key of `FACTORS`.
        n: cases.
        draws: independent noises of each.

    Raises:
        ValueError: if the attribute is unknown, or n is out of range.

    Example:
        >>> [(case, label)] = make_cases("style", 1, draws=2)
        >>> case.subject == label, case.corruption.draws
        (True, 2)
    """
    if attribute not in FACTORS:
        raise ValueError(f"no attribute {attribute!r}; the attributes are {', '.join(FACTORS)}")
    if not 1 <= n <= _MOST_CASES:
        raise ValueError(f"an attribute has 1 to {_MOST_CASES} cases, got {n}")
    number = list(FACTORS).index(attribute)
    rng = numpy.random.default_rng([20231020, number])
    cases, prompts = [], set()
    while len(cases) < n:
        caption = world.sample(rng)
        subject = _subject(attribute, caption)
        if subject is None or caption.text in prompts:
            continue
        prompts.add(caption.text)
        case = Case(caption.text, subject, GaussianNoise(draws=draws), seed=_MOST_CASES * number + len(cases))
        cases.append((case, getattr(caption.scene, FACTORS[attribute])))
    return cases


def _subject(attribute: str, caption: world.Caption) -> str | None:
    """The words of a caption that state an attribute, or None if none do."""
    scene = caption.scene
    if {"color": "background"}.get(attribute, attribute) not in caption.said:
        return None
    candidates = {
        "object": (world.plural(scene.object), scene.object),
        "style": (scene.style,),
        "color": (scene.background,) if scene.background != "white" else (),
        "count": (_COUNTS[scene.count],) if scene.count in _COUNTS else (),
        "viewpoint": _VIEWS.get(scene.viewpoint, ()),
        "pose": ("upside down",),
        "fact": ((scene.fact or "").removeprefix("the "),),
    }
    return next((words for words in candidates[attribute] if find_spans(caption.text, words)), None)


@dataclasses.dataclass(frozen=True)
class StatedProbability(DifferentiableMetric):
    """The probability that the probe gives to what each case's caption states.

    Attributes:
        probe: the classifier of the emoji world.
        factor: what it is asked about.
        labels: by case, the label that its caption states.
    """

    probe: AttributeProbe
    factor: str
    labels: Mapping[Case, object]

    name = "probe_probability"
    needs_images = True

    def score(self, images: torch.Tensor, latents: torch.Tensor, cases: Sequence[Case]) -> torch.Tensor:
        """One number per row, with gradients."""
        known = self.probe.labels(self.factor)
        chosen = [known.index(self.labels[case]) for case in cases]
        logits = self.probe(images.to(self.probe.dtype))[self.factor]
        return logits.float().softmax(-1)[range(len(cases)), chosen]
