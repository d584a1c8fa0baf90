"""Results as data, and as a page of verdicts and tables."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.reproduce.attributions.fidelity import GOAL, GOAL_SCREENED, SCREENED, Fidelity, K, reaches
from benchmarks.reproduce.attributions.predictions import N_LATENTS
from benchmarks.reproduce.attributions.recipes import BY_OBJECTIVE, N_PROMPTS
from benchmarks.reproduce.attributions.results import Ablations, Maps, Predictions, Whereabouts
from benchmarks.reproduce.attributions.whereabouts import N_STEPS, Share
from benchmarks.reproduce.claims import Claim, Finding
from benchmarks.reproduce.edits.pages import in_words
from benchmarks.reproduce.report import plain
from editing.evaluation import UNEDITED

Found = Maps | Predictions | Ablations | Whereabouts

_ENTRIES = {
    "gone": "source gone",
    "target": "target shown",
    "specificity": "specificity",
    "specificity_change": "its change",
}


def as_json(found: Found, model: str, settings: Mapping) -> dict:
    """Everything, without NaN, which JSON does not have.

    Args:
        found: what a part came to.
        model: fingerprint of the pipeline.
        settings: what was run, for the reader.
    """
    reached = {"goals": goals(found.fidelities)} if isinstance(found, Maps) else {}
    verdicts = {claim.statement: claim.verdict for claim in found.claims}
    record = {"model": model, "settings": dict(settings), "claims": verdicts, **reached}
    return plain(record | {"found": dataclasses.asdict(found)})


def goals(found: Sequence[Fidelity]) -> list[dict]:
    """For each kind of map and statistic, how many attributes reach the goal, the median and the lowest of them."""
    rows = []
    for about in dict.fromkeys((one.places, one.metric, one.variant) for one in found):
        group = [one for one in found if (one.places, one.metric, one.variant) == about]
        goal = group[0].goal
        for statistic in ("spearman", "recall"):
            values = {one.attribute: getattr(one, statistic) for one in group}
            verdicts = [reaches(value, goal) for value in values.values()]
            means = {attribute: value.mean for attribute, value in values.items() if not math.isnan(value.mean)}
            lowest = min(means, key=means.__getitem__, default="")
            rows.append(
                dict(zip(("places", "metric", "variant"), about, strict=True))
                | {"statistic": statistic, "goal": goal, "n": len(group)}
                | {"met": verdicts.count("met"), "not_met": verdicts.count("not met")}
                | {"median": _median(means.values()), "lowest": means.get(lowest, math.nan), "lowest_of": lowest}
            )
    return rows


def as_markdown(found: Found, settings: Mapping, figures: Sequence[str]) -> str:
    """A part's verdicts and tables, as a section.

    Args:
        found: what the part came to.
        settings: what was run, for the reader.
        figures: names of its figures, but for those of claims.
    """
    title, describe = _SECTIONS[type(found)]
    lines = [f"## {title}", "", "; ".join(f"{name} {value}" for name, value in settings.items()) + ".", ""]
    lines += describe(found)
    for figure in figures:
        lines += ["", f"![{figure.replace('_', ' ')}]({figure}.png)"]
    return "\n".join(lines) + "\n"


def _maps(found: Maps) -> list[str]:
    lines = [
        f"Spearman's ρ over all places, and recall of the {K} largest exact effects. The goal is {GOAL}, and",
        f"{GOAL_SCREENED} once the best {SCREENED:.0%} of places are restored exactly. Effects are means over cases,",
        "the same cases and noises in both maps; an estimate for all of sampling is the sum over its steps. Brackets:",
        "95% percentile intervals over cases, which are not centred. Attributes meet a goal by their estimates.",
        "",
    ]
    header = ["places", "metric", "variant", "statistic", "goal", "median", "lowest", "attributes that meet it"]
    rows = [
        (
            *(one[key] for key in ("places", "metric", "variant", "statistic", "goal")),
            _number(one["median"]),
            f"{_number(one['lowest'])} ({one['lowest_of']})",
            f"{one['n'] - one['not_met']} of {one['n']}; {one['met']} with all of the interval",
        )
        for one in goals(found.fidelities)
    ]
    lines += _table(header, rows)
    for places, metric in dict.fromkeys((one.places, one.metric) for one in found.fidelities):
        group = [one for one in found.fidelities if (one.places, one.metric) == (places, metric)]
        lines += ["", f"### {places[0].upper()}{places[1:]}; {metric}", ""]
        lines += ["Other attributes: ρ of their estimates with the exact map of this one.", ""]
        recall = f"recall, by chance {group[0].chance:.2f}"
        header = ["attribute", "total effect", "variant", "ρ", "ρ of other attributes", recall]
        rows = [
            (one.attribute, one.total, one.variant, one.spearman, _number(one.control), one.recall) for one in group
        ]
        lines += [*_table(header, rows), "", *_where(found, places, metric)]
    return lines


def _where(found: Maps, places: str, metric: str) -> list[str]:
    """Where estimates agree, over attributes, and the largest misses."""
    parts = [one for one in found.parts if (one.places, one.metric) == (places, metric)]
    header = ["within", "variant", "places", "ρ, median over attributes", "estimate / exact", "right signs"]
    rows = []
    for part, variant in dict.fromkeys((one.part, one.variant) for one in parts):
        group = [one for one in parts if (one.part, one.variant) == (part, variant)]
        medians = (_number(_median(getattr(one, name) for one in group)) for name in ("spearman", "slope", "signs"))
        rows.append((part, variant, max(one.n for one in group), *medians))
    misses = [one for one in found.misses if (one.places, one.metric) == (places, metric)]
    largest = sorted(misses, key=lambda one: -abs(one.estimate - one.exact))[:5]
    named = (
        f"{one.place} of {one.attribute} ({one.variant} {one.estimate:.2g}, exact {one.exact:.2g})" for one in largest
    )
    return [*_table(header, rows), "", f"Missed most: {'; '.join(named)}."]


def _predictions(found: Predictions) -> list[str]:
    lines = [
        f"J is measured at the same {N_LATENTS} latents before and after weights are set to 0. Brackets: 95% intervals",
        "over ablations. Control: r with scores of other weights of the same matrices; for single layers, with the sum",
        "of their squared weights. Slope: of true by predicted changes, by least squares.",
        "",
    ]
    header = ["question", "ablations", "n", "Pearson's r", "Spearman's ρ", "control", "slope"]
    rows = [
        (one.question, one.ablations, f"{one.n:,}", one.pearson, one.spearman, one.control, _number(one.slope))
        for one in found.rows
    ]
    lines += [*_table(header, rows), "", "The best weights by scores and by controls, each set taken at once:", ""]
    header = ["question", "scores and ratio", "weights", "predicted change, as part of J", "true change"]
    rows = [
        (one.question, one.label, f"{one.n_weights:,}", f"{one.predicted:+.1%}", f"{one.actual:+.1%}")
        for one in found.choices
    ]
    return [*lines, *_table(header, rows), *_claims(found.claims)]


def _ablations(found: Ablations) -> list[str]:
    named = {what: " and ".join(one.name for one in BY_OBJECTIVE[what]) for what in found.rows}
    lines = [
        f"Concepts: {'; '.join(f'to {what}, {names}' for what, names in named.items())}. What is to be amplified must",
        "not be in all pictures to begin with: these are two that it draws less often, with scores of rendered",
        "pictures that show them. Diff-QuickFix puts one concept in another's place: it can take one away, and has no",
        "way to bring one out, so that it stands beside erasing only.",
        f"Pictures of {N_PROMPTS} prompts for each role and concept, drawn from the same noise without and with each",
        "ablation; models are named by scores and ratio.",
        "Source gone: share of pictures that name the concept and do not show it, which amplifying is to lower; the",
        "first row says how many do not to begin with. 95% intervals: Wilson's for shares, which takes pictures for",
        "independent; bootstrap over prompts for the change of specificity.",
    ]
    for (objective, rows), claim in zip(found.rows.items(), found.claims, strict=True):
        cells = [(row["model"], *(_cell(row, name) for name in _ENTRIES)) for row in rows]
        lines += ["", f"### {objective.capitalize()}", "", *_table(["%", *_ENTRIES.values()], cells)]
        lines += _claims([claim])
    return lines


def _places(found: Whereabouts) -> list[str]:
    lines = [
        f"Shares of all weights' scores for erasing, by kind of site, from one trajectory of {N_STEPS} steps for each",
        "concept; brackets: intervals over concepts.",
        "",
    ]
    header = ["attribute", "component", "of positive scores", "of negative scores", "of weights"]
    rows = [
        (one.attribute, one.component.replace("_", " "), one.positive, one.negative, _number(one.weights))
        for one in found.shares
    ]
    lines += [*_table(header, rows), "", "Of single layers, in the order in which they run:", ""]
    lines += _layers(found.layers)
    if not found.claims:
        return [*lines, "", "No causal map was found, so that nothing can be set against these: see --maps."]
    lines += [*_claims(found.claims), "", "The same of negative scores, of which nothing is claimed:", ""]
    rows = [(one.attribute, one.place, one.estimate, one.control) for one in found.negatives]
    return lines + _table(["", "of", "estimate", "control"], rows)


def _layers(found: Sequence[Share]) -> list[str]:
    """A row for each layer: its shares of positive and negative scores by attribute, and of all weights."""
    attributes = list(dict.fromkeys(one.attribute for one in found))
    header = ["layer", "site", *(f"{name}, {sign}" for name in attributes for sign in ("positive", "negative"))]
    rows = []
    for site in dict.fromkeys(one.site for one in found):
        group = {one.attribute: one for one in found if one.site == site}
        values = [one.mean for name in attributes for one in (group[name].positive, group[name].negative)]
        first = group[attributes[0]]
        rows.append((first.layer, site, *(f"{value:.1%}" for value in (*values, first.weights))))
    return _table([*header, "of weights"], rows)


def _claims(claims: Sequence[Claim]) -> list[str]:
    lines = []
    for claim in claims:
        lines += ["", f"### {claim.statement}", ""]
        lines += [f"**{claim.verdict.capitalize()}.** Rule, for each row: {claim.rule}.", ""]
        lines += [f"Estimate: {claim.quantity}. Control: {claim.control}.", ""]
        lines += [*_findings(claim.findings), "", f"![{claim.statement}]({claim.name}.png)"]
    return lines


def _findings(findings: Sequence[Finding]) -> list[str]:
    rows = [(one.attribute, one.place, one.estimate, one.control, one.verdict, one.reason) for one in findings]
    return _table(["", "of", "estimate", "control", "verdict", "why"], rows)


def _cell(row: Mapping, name: str) -> str:
    is_change = name.endswith("_change")
    return "" if is_change and row["model"] == UNEDITED else in_words(row.get(name), signed=is_change)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


_SECTIONS = {
    Maps: ("Attribution patching against restoration", _maps),
    Predictions: ("CAD: predicted and true changes of J", _predictions),
    Ablations: ("CAD-Erase and CAD-Amplify, by the probe", _ablations),
    Whereabouts: ("Where positive and negative scores lie", _places),
}
