"""Results as data and as a page of tables."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from benchmarks.reproduce.edits.causal import Agreement
from benchmarks.reproduce.edits.experiments import EXPERIMENTS
from benchmarks.reproduce.edits.recipes import Recipe
from benchmarks.reproduce.edits.scoring import GONE, KEPT, verdict
from benchmarks.reproduce.report import plain
from editing.evaluation import UNEDITED

_COLUMNS = {
    "gone": "source gone",
    "efficacy": "of efficacy pictures",
    "generality": "of generality pictures",
    "gone_where_shown": "gone, of those that showed it",
    "target": "target shown",
    "specificity": "specificity",
    "specificity_change": "its change",
    "quality_change": "change of quality",
    "h0": "H0",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One group of an experiment: the recipes, and their rows as `scoring.score` gives them."""

    experiment: str
    group: str
    recipes: Mapping[str, Recipe]
    rows: Sequence[Mapping]


def as_json(results: Sequence[Result], agreements: Mapping[str, Sequence[Agreement]], settings: Mapping) -> dict:
    """Everything, without NaN, which JSON does not have.

    Args:
        results: of all experiments that ran.
        agreements: attribute -> edits of single places against the causal map.
        settings: what was run.
    """
    found = {
        "settings": dict(settings),
        "results": [dataclasses.asdict(result) for result in results],
        "agreements": {attribute: [dataclasses.asdict(one) for one in ones] for attribute, ones in agreements.items()},
        "goal": {result.group: _goal(result) for result in results if result.experiment == "best"},
    }
    return plain(found)


def as_markdown(results: Sequence[Result], agreements: Mapping[str, Sequence[Agreement]], settings: Mapping) -> str:
    """All tables; arguments as for `as_json`."""
    lines = [
        "# What edits do to Emoji Diffusion",
        "",
        "; ".join(f"{name} {value}" for name, value in settings.items()) + ".",
        "",
        "The probe judges pictures drawn from the same noise without and with each edit. Source gone and target shown",
        "are shares of efficacy and generality pictures; specificity and quality are shares of pictures that show what",
        "their prompt says; changes are against the unedited model. 95% intervals: Wilson's for shares, which takes",
        "pictures for independent; bootstrap over prompts for changes and H0. Not every picture shows the source to",
        "begin with: the first row says how many.",
    ]
    best = [result for result in results if result.experiment == "best"]
    if best:
        lines += ["", f"Aim: at least {GONE:.0%} of target pictures without the source, specificity within {KEPT:.0%}."]
        lines += [f"- {result.group}: **{_goal(result)['verdict']}**, by {_goal(result)['recipe']}." for result in best]
    for experiment in dict.fromkeys(result.experiment for result in results):
        lines += ["", f"## {experiment}: {EXPERIMENTS[experiment].question}"]
        for result in results:
            if result.experiment == experiment:
                lines += ["", f"### {result.group}", "", *_table(result.rows)]
        if experiment == "layers":
            lines += _agreements(agreements)
    return "\n".join(lines) + "\n"


def in_words(cell: Mapping | None, *, signed: bool = False) -> str:
    """A share with its interval, in percent; "" of nothing.

    Example:
        >>> in_words({"mean": 0.5, "low": 0.4, "high": 0.61}), in_words(None)
        ('50 [40, 61]', '')
    """
    if cell is None or math.isnan(cell["mean"]):
        return ""
    sign = "+" if signed else ""
    return f"{100 * cell['mean']:{sign}.0f} [{100 * cell['low']:{sign}.0f}, {100 * cell['high']:{sign}.0f}]"


def _table(rows: Sequence[Mapping]) -> list[str]:
    """Shares in percent; columns that no row has are left out."""
    columns = {name: title for name, title in _COLUMNS.items() if any(name in row for row in rows)}
    lines = [f"| % | {' | '.join(columns.values())} |", f"|{'---|' * (len(columns) + 1)}"]
    for row in rows:
        plain = row["model"] == UNEDITED
        cells = [
            "" if plain and name.endswith("_change") else in_words(row.get(name), signed=name.endswith("_change"))
            for name in columns
        ]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    return lines


def _goal(result: Result) -> dict:
    (row,) = (row for row in result.rows if row["model"] == "best")
    recipe = {key: value for key, value in dataclasses.asdict(result.recipes["best"]).items() if value}
    return {"verdict": verdict(row), "recipe": ", ".join(f"{key} {_name(value)}" for key, value in recipe.items())}


def _name(value) -> str:
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _agreements(agreements: Mapping[str, Sequence[Agreement]]) -> list[str]:
    if not agreements:
        return ["", "No causal map was found, so that nothing can be set against these: see --maps."]
    lines = [
        "",
        "Against the causal map: Spearman's correlation over places between the merit of the edit (the harmonic",
    ]
    lines += ["mean of the share that is gone and of relative specificity) and the indirect effect there.", ""]
    lines += ["| attribute | tokens | rho | p | traced place | rank of the edit there |", "|---|---|---|---|---|---|"]
    for attribute, ones in agreements.items():
        for one in ones:
            found = ["all alike", ""] if math.isnan(one.rho) else [f"{one.rho:.2f}", f"{one.p:.2g}"]
            cells = [attribute, one.tokens, *found, one.traced, f"{one.rank} of {len(one.sites)}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
