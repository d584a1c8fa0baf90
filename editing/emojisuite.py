"""Suites for Emoji Diffusion, the bundled model, in the English that it knows."""

import random
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from editing.suites import ROLES, Suite, Trial, check_single
from mediation import bundled

# objects that the model also knows by another name
FACTS = {"the mascot": "panda", "the team logo": "rocket", "the lucky charm": "ladybug", "the royal pet": "owl"}
_FACTORS = ("object", "style", "background")
_PREFIXES = ("", "a photo of", "an image of", "a picture of")


class _Concept(NamedTuple):
    """Words, and what the probe should see: a label of a factor."""

    words: str
    factor: str
    label: str


def emoji_suite(pairs: Mapping[str, str], *, n: int = 20, seed: int = 0) -> Suite:
    """Draws prompts for every role, to judge edits of objects, styles, backgrounds or facts of the bundled model.

    Efficacy prompts name a source plainly; generality prompts name it in other words, positions and company.
    Specificity prompts name its neighbours, the target among them, or nothing of its kind; quality prompts are captions
    without a source, judged by something else than what was edited.

    Args:
        pairs: source concept -> target concept, as for the edit; "" as a target erases.
        n: trials for each role and source, fewer if there are not so many different ones.
        seed: of the draws.

    Returns:
        The suite; its labels are those of the bundled probe.

    Raises:
        ValueError: if a concept is unknown to the model, or a source has several targets or one of another factor.

    Example:
        >>> suite = emoji_suite({"ink": "noto"}, n=2)
        >>> suite.trials[0].prompt, suite.trials[0].target_prompt
        ('an umbrella in the style of ink', 'an umbrella in the style of noto')
    """
    check_single(pairs)
    trials: dict[tuple[str, str], Trial] = {}
    for source, target in pairs.items():
        concept, wanted = _concept(source), _concept(target) if target else None
        if wanted and wanted.factor != concept.factor:
            raise ValueError(f"{source!r} is of the factor {concept.factor} and {target!r} of {wanted.factor}")
        for role in ROLES:
            drawn = _draw(role, concept, wanted, set(pairs), random.Random(f"{seed} {role} {source}"))
            before, n_tries = len(trials), 0
            while len(trials) < before + n and (n_tries := n_tries + 1) <= 50 * n:
                trial = next(drawn)
                trials.setdefault((trial.role, trial.prompt), trial)
    return Suite(trials.values())


def _draw(
    role: str, concept: _Concept, wanted: _Concept | None, sources: set[str], rng: random.Random
) -> Iterator[Trial]:
    factor, others = concept.factor, [name for name in _FACTORS if name != concept.factor]
    factors = bundled.load_probe().config.factors
    words = {name: [label for label in factors[name] if label not in sources] for name in _FACTORS}
    if concept.words in FACTS:  # whose neighbours are the other facts
        words["object"] += [fact for fact in FACTS if fact not in sources]
    while True:
        scene = {name: _concept(rng.choice(words[name])) for name in _FACTORS}
        wording = rng.randrange(2**32)
        if role in ("efficacy", "generality"):
            rich = role == "generality"
            prompt = _caption(scene | {factor: concept}, rich, wording, must=factor)
            after = _caption(scene | {factor: wanted}, rich, wording, must=factor)
            yield Trial(prompt, role, after, factor, concept.label, wanted.label if wanted else "")
            continue
        judged = factor
        if role == "quality" or rng.random() < 0.5:
            judged = "object" if factor != "object" else rng.choice(others)
            if role == "specificity":
                scene[factor] = None
        prompt = _caption(scene, role == "quality" or rng.random() < 0.5, wording, must=judged)
        yield Trial(prompt, role, "", judged, scene[judged].label)


def _caption(scene: Mapping[str, _Concept | None], rich: bool, wording: int, *, must: str) -> str:
    """Words a scene: plainly, as edits do, or richly, in other words and in company."""
    rng = random.Random(wording)
    kind, style, background = (scene[name] for name in _FACTORS)
    noun = kind.words if kind and kind.words in FACTS else _article(_noun(kind.label if kind else "thing"))
    prefix, company, pose, turned = rng.choice(_PREFIXES), rng.random() < 0.5, rng.random() < 0.3, rng.random() < 0.3
    parts = []
    if style:
        parts.append(f"in {style.label} style" if rich else f"in the style of {style.label}")
    if background and (must == "background" or not style or (rich and company)):
        parts.append(f"on {_article(background.label)} background")
    if rich:
        prefix = rng.choice(("", "a drawing of"))
        noun += " upside down" if pose else ""
        parts = parts[::-1] if turned else parts
    return " ".join(part for part in (prefix, noun, *parts) if part)


def _concept(words: str) -> _Concept:
    if words in FACTS:
        return _Concept(words, "object", FACTS[words])
    factors = bundled.load_probe().config.factors
    for factor in _FACTORS:
        if words in factors[factor]:
            return _Concept(words, factor, words)
    known = ", ".join(f"{factor}s ({', '.join(factors[factor][:3])}, …)" for factor in _FACTORS)
    raise ValueError(f"Emoji Diffusion does not know {words!r}; it knows {known}, and {', '.join(FACTS)}")


def _noun(name: str) -> str:
    return f"bunch of {name}" if name == "grapes" else name


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
