"""Suites for Emoji Diffusion, the bundled model, in the English that it knows."""

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from editing.suites import ROLES, Suite, Trial, check_single
from mediation import bundled

# objects that the model also knows by another name
FACTS = {"the mascot": "panda", "the team logo": "rocket", "the lucky charm": "ladybug", "the royal pet": "owl"}
_FACTORS = ("object", "style", "background")  # of every scene
# factors that scenes have only where they are edited: words -> the probe's label
_EXTRAS = {
    "count": {"one": "1", "two": "2", "three": "3"},
    "viewpoint": {"close up": "close up", "distant view": "distant"},
    "pose": {"upside down": "upside down", "upright": "upright"},
}
_UNSAID = "upright"  # no caption says it
_IRREGULAR = {"fox": "foxes", "butterfly": "butterflies", "strawberry": "strawberries", "cactus": "cacti"}
_PREFIXES = ("", "a photo of", "an image of", "a picture of")


class _Concept(NamedTuple):
    """Words, and what the probe should see: a label of a factor."""

    words: str
    factor: str
    label: str


def emoji_suite(pairs: Mapping[str, str], *, n: int = 20, seed: int = 0, avoid: Iterable[str] = ()) -> Suite:
    """Draws prompts for every role, to judge edits of the bundled model.

    What is edited are objects, styles, backgrounds, facts, counts ("two"), viewpoints ("close up", "distant view") or
    the pose ("upside down"; "upright" can be a target only, since no caption says it).
    Efficacy prompts name a source plainly; generality prompts name it in other words, positions and company.
    Half of the specificity prompts are efficacy prompts with the source's words left out, judged by what else is in
    them; the others name its neighbours, the target among them. Quality prompts are captions without a source, judged
    by something else than what was edited. Where all values of a factor are sources, there are no neighbours, and
    nothing but a source names that factor: all specificity prompts are of the first kind.

    Args:
        pairs: source concept -> target concept, as for the edit; "" as a target erases.
        n: trials for each role and source, fewer if there are not so many different ones.
        seed: of the draws.
        avoid: prompts that are not to be drawn, such as those that something was chosen by.

    Returns:
        The suite; its labels are those of the bundled probe.

    Raises:
        ValueError: if a concept is unknown to the model, a source is never said, or it has several targets or one of
            another factor, or so much is edited that nothing is left to name beside it.

    Example:
        >>> suite = emoji_suite({"ink": "noto"}, n=2)
        >>> suite.trials[0].prompt, suite.trials[0].target_prompt
        ('an umbrella in the style of ink', 'an umbrella in the style of noto')
    """
    check_single(pairs)
    trials: dict[tuple[str, str], Trial] = {}
    avoided = frozenset(avoid)

    def add(trial: Trial) -> bool:
        is_new = trial.prompt not in avoided and (trial.role, trial.prompt) not in trials
        if is_new:
            trials[trial.role, trial.prompt] = trial
        return is_new

    for source, target in pairs.items():
        concept, wanted = _concept(source), _concept(target) if target else None
        if source == _UNSAID:
            raise ValueError(f"no caption of Emoji Diffusion says {source!r}: it can be a target, and no source")
        if wanted and wanted.factor != concept.factor:
            raise ValueError(f"{source!r} is of the factor {concept.factor} and {target!r} of {wanted.factor}")
        words = _said(concept, set(pairs))
        _check_rest(concept, words)
        without: list[Trial] = []
        for role in ROLES:
            drawn = _draw(role, concept, wanted, set(pairs), words, random.Random(f"{seed} {role} {source}"))
            before, n_tries, most_tries = len(trials), 0, 50 * n
            if role == "specificity":
                has_neighbours = bool(words[concept.factor])
                most_without, most_tries = (n // 2, most_tries) if has_neighbours else (n, 0)
                for trial in without:
                    if len(trials) < before + most_without:
                        add(trial)
            while len(trials) < before + n and (n_tries := n_tries + 1) <= most_tries:
                trial, partner = next(drawn)
                if add(trial) and partner:
                    without.append(partner)
    return Suite(trials.values())


def _said(concept: _Concept, sources: set[str]) -> dict[str, list[str]]:
    """By factor, the words that name it in prompts beside a concept: none that is edited."""
    factors = bundled.load_probe().config.factors
    words = {name: [label for label in factors[name] if label not in sources] for name in _FACTORS}
    words |= {name: [word for word in labels if word not in sources] for name, labels in _EXTRAS.items()}
    if concept.words in FACTS:  # whose neighbours are the other facts
        words["object"] += [fact for fact in FACTS if fact not in sources]
    return words


def _beside(factor: str) -> str:
    """What a prompt is judged by that a concept of this factor was left out of."""
    return "style" if factor == "object" else "object"


def _check_rest(concept: _Concept, words: Mapping[str, list[str]]) -> None:
    others = [name for name in _FACTORS if name != concept.factor and words[name]]
    if not others or not (words[concept.factor] or _beside(concept.factor) in others):
        gone = " and ".join(name for name in _FACTORS if not words[name])
        raise ValueError(
            f"every {gone} is edited, so that nothing is left to judge specificity or quality of {concept.words!r} by"
        )


def _draw(
    role: str,
    concept: _Concept,
    wanted: _Concept | None,
    sources: set[str],
    words: Mapping[str, list[str]],
    rng: random.Random,
) -> Iterator[tuple[Trial, Trial | None]]:
    """Trials of a role; those of efficacy with a partner, the same without the concept."""
    factor, others = concept.factor, [name for name in _FACTORS if name != concept.factor and words[name]]
    while True:
        scene = {name: _concept(rng.choice(words[name])) for name in _FACTORS if words[name]}
        if not sources.isdisjoint(_EXTRAS["pose"]):  # which other scenes have at random
            scene["pose"] = _concept(_UNSAID)
        wording = rng.randrange(2**32)
        if role in ("efficacy", "generality"):
            rich, partner = role == "generality", None
            scene[factor] = concept
            prompt = _caption(scene, rich, wording, must=factor)
            after = _caption(scene | {factor: wanted}, rich, wording, must=factor) if wanted else None
            bare = _caption(scene, rich, wording, must=factor, left_out=factor)
            if not rich and (judged := _beside(factor)) in scene:
                partner = Trial(bare, "specificity", "", judged, scene[judged].label)
            label = wanted.label if wanted else ""
            yield Trial(prompt, role, after or bare, factor, concept.label, label), partner
            continue
        judged = factor
        if role == "quality":
            judged = "object" if "object" in others else rng.choice(others)
        elif factor in _EXTRAS:
            scene[factor] = _concept(rng.choice(words[factor]))
        prompt = _caption(scene, role == "quality" or rng.random() < 0.5, wording, must=judged)
        yield Trial(prompt, role, "", judged, scene[judged].label), None


def _caption(scene: Mapping[str, _Concept], rich: bool, wording: int, *, must: str, left_out: str | None = None) -> str:
    """Words a scene: plainly, as edits do, or richly, in other words and in company; one factor may be left out."""
    rng = random.Random(wording)
    kind, style, background = (scene.get(name) if name != left_out else None for name in _FACTORS)
    prefix, company, pose, turned = rng.choice(_PREFIXES), rng.random() < 0.5, rng.random() < 0.3, rng.random() < 0.3
    single, plural = (_noun(kind.label), _plural(kind.label)) if kind else ("thing", "things")
    noun = kind.words if kind and kind.words in FACTS else _article(single)
    extras = {name: scene[name].words for name in _EXTRAS if name in scene and name != left_out}
    if "pose" in scene:
        upside_down = extras.get("pose") == "upside down"
        pose = rich and upside_down
        noun = _article(f"upside down {single}") if upside_down and not rich else noun
    if "count" in extras:
        noun = f"{extras['count']} {single if extras['count'] == 'one' else plural}"
    parts = []
    if style:
        parts.append(f"in {style.label} style" if rich else f"in the style of {style.label}")
    if background and (must == "background" or (rich and company)):
        parts.append(f"on {_article(background.label)} background")
    if rich:
        prefix = rng.choice(("", "a drawing of"))
        noun += " upside down" if pose else ""
        parts = parts[::-1] if turned else parts
    if "viewpoint" in extras:
        if rich and extras["viewpoint"] == "close up" and rng.random() < 0.5:
            return " ".join(part for part in (prefix, noun, *parts) if part) + ", close up"
        noun = f"{_article(extras['viewpoint'])} of {noun}"
    return " ".join(part for part in (prefix, noun, *parts) if part)


def _concept(words: str) -> _Concept:
    if words in FACTS:
        return _Concept(words, "object", FACTS[words])
    factors = bundled.load_probe().config.factors
    for factor in _FACTORS:
        if words in factors[factor]:
            return _Concept(words, factor, words)
    for factor, labels in _EXTRAS.items():
        if words in labels:
            return _Concept(words, factor, labels[words])
    known = ", ".join(f"{factor}s ({', '.join(factors[factor][:3])}, …)" for factor in _FACTORS)
    others = ", ".join([*FACTS, *(word for labels in _EXTRAS.values() for word in labels)])
    raise ValueError(f"Emoji Diffusion does not know {words!r}; it knows {known}, and {others}")


def _noun(name: str) -> str:
    return f"bunch of {name}" if name == "grapes" else name


def _plural(name: str) -> str:
    return "bunches of grapes" if name == "grapes" else _IRREGULAR.get(name, f"{name}s")


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
