"""Pages, figures and data tell the same, and are composed of the parts that ran."""

import argparse
import dataclasses
import json
import re

import matplotlib.pyplot
import pytest

from benchmarks.reproduce import attribution
from benchmarks.reproduce.attributes import FACTORS
from benchmarks.reproduce.attributions import (
    composing,
    correlations,
    fidelity,
    figures,
    pages,
    selectivity,
    variants,
    whereabouts,
)
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.attributions.results import Ablations, Maps, Predictions, Whereabouts
from benchmarks.reproduce.edits.scoring import score
from tests.attributions import EXACT, REVERSED, judged, planted_scores, predicted_changes, with_metric

CAD = named("cad", max(RATIOS))
OPTIONS = {"cases_per_attribute": 1, "steps": 7, "guidance_scale": 4.0, "random_ablations": 360}


@pytest.fixture(scope="module")
def maps_of_one_case():
    """What one case comes to: it has no intervals, and JSON has no NaN."""
    exact = {"style": with_metric(EXACT[:1]), "object": with_metric(REVERSED[:1])}
    estimates = {attribute: {"estimated": one, "integrated": one} for attribute, one in exact.items()}
    compared = [
        variants.Compared(variants.SITES, attribute, exact[attribute], estimates[attribute]) for attribute in exact
    ]
    fidelities = fidelity.fidelities(variants.SITES, exact, estimates)
    return Maps(fidelities, *fidelity.failures(variants.SITES, "style", exact["style"], estimates["style"])), compared


def test_pages_figures_and_data_tell_the_same(maps_of_one_case, tmp_path, monkeypatch):
    for module in (correlations, selectivity, whereabouts):
        monkeypatch.setattr(module, "_N_RESAMPLES", 50)  # which is no matter here
    maps, compared = maps_of_one_case
    changes = predicted_changes()
    rows = correlations.summarize(changes)
    report = judged({"unedited": (0.8, 0.9), CAD: (0.2, 0.9)}, n=10)
    scores, selective = score(report), selectivity.measure(report, "erase")
    sums, causal = ({"style": one} for one in planted_scores("positive"))
    shares, layers = (find("style", sums["style"]) for find in (whereabouts.shares, whereabouts.layer_shares))
    claim, negatives = whereabouts.positive_where_causal(sums, causal)
    results = {
        "maps": maps,
        "predictions": Predictions(rows, correlations.choices(changes), [correlations.predicts({"erase ink": rows})]),
        "ablations": Ablations({"erase": scores}, {"erase": selective}, [selectivity.is_selective(selective, "erase")]),
        "places": Whereabouts(shares, layers, [claim], negatives),
    }
    drawn = {
        "maps": figures.of_maps(maps.fidelities, compared),
        "predictions": figures.of_predictions([changes, changes]),
        "ablations": figures.of_ablations({"erase": scores}),
        "places": figures.of_places(shares, sums, causal),
    }
    for part in reversed(attribution.PARTS):
        attribution.keep(part, results[part], drawn[part], "a model", argparse.Namespace(output=tmp_path, **OPTIONS))
    verdicts = composing.compose(tmp_path, list(attribution.PARTS), "Title", "Scope.")

    page, record = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    claims = [claim for found in results.values() for claim in found.claims]
    assert len(pictures) == 2 + 2 + 1 + 2 + len(claims)
    for table in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, "no cell has a bar in it"
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in pictures)
    assert record["maps"]["found"]["fidelities"][0]["spearman"]["low"] is None
    assert {(one["n"], one["met"], one["not_met"]) for one in record["maps"]["goals"]} == {(2, 0, 0)}
    assert "| 2 of 2; 0 with all of the interval |" in page
    assert "fingerprint a model; cases per attribute 1; steps 7; guidance scale 4.0." in page
    assert verdicts == {claim.statement: claim.verdict for claim in claims}
    assert len(verdicts) == 3
    for statement, verdict in verdicts.items():
        assert f"| {statement} | **{verdict}** |" in page
    (erased,) = (row for row in scores if row["model"] == CAD)
    assert f"| {CAD} | {pages.in_words(erased['gone'])} |" in page
    assert record["predictions"]["found"]["rows"][0]["pearson"]["mean"] == pytest.approx(rows[0].pearson.mean)
    assert f"| erase ink | {rows[0].ablations} | 360 | {rows[0].pearson} |" in page
    (last,) = (one for one in record["places"]["found"]["layers"] if one["layer"] == 19)
    assert last["positive"]["mean"] == pytest.approx(layers[-1].positive.mean)
    cells = [f"{value:.1%}" for value in (layers[-1].positive.mean, layers[-1].negative.mean, layers[-1].weights)]
    assert f"| 19 | unet.19.resnet | {' | '.join(cells)} |" in page


def test_the_scope_says_which_attributes_maps_are_of(maps_of_one_case, tmp_path):
    assert "Maps are of no attribute. Cases" in attribution.scope(tmp_path)
    found = maps_of_one_case[0]
    for attributes, expected in (
        (["style"], "Maps are of style, not of object, color, count, viewpoint, pose, fact. Cases"),
        (["style", "object"], "Maps are of style and object, not of color, count, viewpoint, pose, fact. Cases"),
        (list(FACTORS), "Maps are of object, style, color, count, viewpoint, pose and fact. Cases"),
    ):
        fidelities = [dataclasses.replace(found.fidelities[0], attribute=attribute) for attribute in attributes]
        record = pages.as_json(dataclasses.replace(found, fidelities=fidelities), "m", {})
        composing.keep(tmp_path, "maps", record, "## Maps\n")
        assert expected in attribution.scope(tmp_path)


@pytest.mark.parametrize(("n", "rows", "columns"), [(3, 1, 3), (7, 2, 4)])
def test_effects_of_many_attributes_take_several_rows(maps_of_one_case, n, rows, columns):
    one = maps_of_one_case[1][0]
    compared = [dataclasses.replace(one, attribute=attribute) for attribute in list(FACTORS)[:n]]
    figure = figures.draw_effects(compared, "m")
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in shown] == list(FACTORS)[:n]
    assert len(figure.axes) == rows * columns
    assert figure.get_size_inches()[0] == 2.5 * columns + 0.5
    matplotlib.pyplot.close(figure)


def test_a_thousand_random_ablations_are_the_default_and_the_help_says_of_how_many_weights(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attribution"])
    assert attribution.parse().random_ablations == 1000
    monkeypatch.setattr("sys.argv", ["attribution", "--help"])
    with pytest.raises(SystemExit):
        attribution.parse()
    assert "of 1% of the weights, for each question" in capsys.readouterr().out


def test_the_page_has_what_ran_so_far_in_order(tmp_path):
    def keep(part, verdict):
        composing.keep(tmp_path, part, {"model": "m", "claims": {f"{part} holds": verdict}}, f"## {part}\n")
        return composing.compose(tmp_path, ["first", "second", "third"], "Title", "Scope.")

    assert keep("third", "reproduced") == {"third holds": "reproduced"}
    assert keep("first", "inconclusive") == {"first holds": "inconclusive", "third holds": "reproduced"}
    assert keep("first", "not reproduced") == {"first holds": "not reproduced", "third holds": "reproduced"}
    page = (tmp_path / "report.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == ["# Title", "## first", "## third"]
    assert "| first holds | **not reproduced** |" in page
    assert list(json.loads((tmp_path / "report.json").read_text())) == ["scope", "first", "third"]


def test_sections_of_another_model_are_refused(tmp_path):
    composing.keep(tmp_path, "first", {"model": "m", "claims": {}}, "## first\n")
    composing.check(tmp_path, "m")
    with pytest.raises(ValueError, match=r"first\.json is of another model"):
        composing.check(tmp_path, "n")
