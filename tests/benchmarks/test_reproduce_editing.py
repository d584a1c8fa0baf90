"""Which edits are judged, by which prompts, that they are judged once, and what tables make of it."""

import dataclasses
import functools
import itertools
import json
import types

import numpy
import pytest
import torch
import xarray

import editing
import mediation
from benchmarks.reproduce import editing as reproduce
from benchmarks.reproduce.edits import causal, figures, pages, units
from benchmarks.reproduce.edits.experiments import EXPERIMENTS, with_needs
from benchmarks.reproduce.edits.recipes import _CAPTIONS, Recipe, preserved
from benchmarks.reproduce.edits.running import Runner
from benchmarks.reproduce.edits.scoring import merit, pooled, ranked, score, verdict
from benchmarks.reproduce.edits.units import Unit
from mediation.mapfiles import save_map
from tests.maps import make_map

FIRST, SECOND = "text_encoder.0.self_attention", "text_encoder.0.mlp"


@pytest.fixture(scope="module")
def pipe():
    pipe = mediation.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small(**changes):
    """A unit of three prompts."""
    values = {"experiment": "methods", "name": "style-ink", "attribute": "style", "pairs": {"ink": "noto"}}
    values |= {"recipes": {"fixed": Recipe()}, "n": 1, "roles": units.EDIT_ROLES, "seed": 2}
    return Unit(**values | changes)


def made_up(unit, shares=None):
    """A report as `evaluate` would give of a unit, where an edit's shares are given or 0.5."""
    trials, models = list(unit.suite()), ["unedited", *unit.recipes]
    shown = numpy.zeros((len(trials), 1, len(models)))
    for role in units.EDIT_ROLES:
        rows = [i for i, trial in enumerate(trials) if trial.role == role]
        for k, model in enumerate(models):
            share = (shares or {}).get((model, role), 0.5)
            shown[rows[: round(share * len(rows))], 0, k] = 1
    dims = ("trial", "seed", "model")
    variables = {"is_source": shown, "is_target": 1 - shown, "latent_distance": shown}
    coords = {name: ("trial", [getattr(trial, name) for trial in trials]) for name in ("prompt", "role")}
    return xarray.Dataset({k: (dims, v) for k, v in variables.items()}, coords | {"seed": [unit.seed], "model": models})


def test_results_are_reported_on_concepts_and_prompts_that_nothing_was_chosen_by():
    for attribute, pairs in units.TRAINING.items():
        chosen_by = {*pairs, *pairs.values()}
        assert not chosen_by & {*units.REPORTED[attribute], *units.REPORTED[attribute].values()}
    recipes = {attribute: {"fixed": Recipe()} for attribute in units.TRAINING}
    training = units.training_units("finalists", recipes, units.MOST_TRAINING_PROMPTS)
    seen = {trial.prompt for unit in training for trial in unit.suite()}
    for unit in units.reported_units("best", recipes, 25, keeps_pictures=True):
        prompts = {trial.prompt for trial in unit.suite()}
        assert len(prompts) > 80, "prompts are left"
        assert not prompts & seen
        assert unit.seed != training[0].seed, "nor noise"
    with pytest.raises(ValueError, match="at most 12 prompts of each role, got 13"):
        units.training_units("finalists", recipes, 13)


def test_concepts_are_edited_together_in_growing_numbers():
    assert len(units.TOGETHER) == max(units.COUNTS)
    assert not set(units.TOGETHER) & set(units.TOGETHER.values()), "no target is edited away"
    found = units.counted_units("concepts", {"fixed": Recipe()})
    assert [unit.group for unit in found] == [f"{n} at once" for n in units.COUNTS]
    for fewer, more in itertools.pairwise(found):
        assert fewer.pairs.items() < more.pairs.items()
    for unit in found:
        roles = [trial.role for trial in unit.suite()]
        assert min(roles.count(role) for role in units.EDIT_ROLES) >= 15, "twenty, if there are so many"


def test_what_is_preserved_are_the_other_values_of_a_factor():
    assert preserved("nothing", {"ink": "noto"}) == []
    assert set(preserved("neighbours", {"ink": "noto", "flat": "noto"})) == {"noto", "twemoji", "fluent"}
    kept = preserved("neighbours", {"the mascot": "cat"})
    assert {"panda", "cat", "the royal pet"} < set(kept)
    assert "the mascot" not in kept
    assert "red" not in kept
    texts = [entry.text for entry in preserved("captions", {"red": "blue"}) if isinstance(entry, editing.Prompt)]
    assert "" in texts
    with pytest.raises(ValueError, match="got 'friends'"):
        preserved("friends", {"ink": "noto"})


def test_sites_are_edited_one_after_the_other(pipe):
    whole = Recipe(sites=(FIRST, SECOND), templates="captions").make(pipe, {"ink": "noto"}, "style")
    first = Recipe(sites=(FIRST,), templates="captions").make(pipe, {"ink": "noto"}, "style")
    with first.applied(pipe):
        second = Recipe(sites=(SECOND,), templates="captions").make(pipe, {"ink": "noto"}, "style")
    apart = Recipe(sites=(SECOND,), templates="captions").make(pipe, {"ink": "noto"}, "style")
    (a, b), (x,), (y,), (z,) = (list(edit.updates.values()) for edit in (whole, first, second, apart))
    assert torch.equal(a.dense(), x.dense())
    assert torch.equal(b.dense(), y.dense())
    assert not torch.allclose(b.dense(), z.dense(), atol=1e-3), "the first edit changes what the second site receives"
    with whole.applied(pipe):
        pass


@pytest.mark.parametrize("attribute", list(units.REPORTED))
def test_every_recipe_makes_an_edit_of_every_attribute(pipe, attribute):
    (source, target), *_ = units.REPORTED[attribute].items()
    shared = {"templates": "captions", "preserve": "captions"}
    for recipe in (
        Recipe("released"),
        Recipe(tokens="from_subject", **shared),
        Recipe(regularization="auto", **shared),
        # With all tokens, "the" of one fact would be edited, and that of the others preserved.
        Recipe("uce", tokens="all", **shared | ({"preserve": "nothing"} if attribute == "fact" else {})),
        Recipe("loco", layers=(0, 1)),
        Recipe("time"),
    ):
        edit = recipe.make(pipe, {source: target}, attribute)
        assert edit.metadata["pairs"] == {source: target}
        assert all(update.norm() > 0 for update in edit.updates.values())


def test_a_unit_is_run_once_and_unedited_pictures_are_drawn_once(pipe, tmp_path, monkeypatch):
    given, real = [], editing.evaluate
    monkeypatch.setattr(editing, "evaluate", lambda *a, **k: given.append(k["unedited"]) or real(*a, **k))
    runner = Runner(pipe, tmp_path, "model", num_inference_steps=1, guidance_scale=4.0)
    report = runner.run(small(keeps_pictures=True))
    assert report.model.values.tolist() == ["unedited", "fixed"]
    assert sorted(set(report.role.values)) == sorted(units.EDIT_ROLES)
    assert "images" not in report
    assert (tmp_path / "methods" / "style-ink.png").stat().st_size > 1000
    xarray.testing.assert_identical(runner.run(small(keeps_pictures=True)), report)
    assert given == [None], "the second time it came from its file"

    other = runner.run(small(experiment="lambdas", recipes={"strong": Recipe(regularization=1e3)}))
    assert given[1] is not None, "the same prompts and noise"
    numpy.testing.assert_array_equal(other.label.sel(model="unedited"), report.label.sel(model="unedited"))
    assert float(other.latent_distance.sel(model="strong").max()) < float(report.latent_distance.max())
    assert len(list((tmp_path / "unedited").iterdir())) == 1
    for changed, unit in (
        (runner, small(n=2)),
        (dataclasses.replace(runner, model="other"), small(keeps_pictures=True)),
    ):
        with pytest.raises(ValueError, match="was made with another model or other settings"):
            changed.run(unit)


def test_shares_are_counted_over_the_right_pictures():
    unit = small(n=10, recipes={"half": Recipe(), "all": Recipe()})
    shares = {("unedited", "efficacy"): 0.8, ("unedited", "generality"): 0.8, ("unedited", "specificity"): 0.9}
    shares |= {("half", "efficacy"): 0.4, ("half", "generality"): 0.4, ("half", "specificity"): 0.9}
    shares |= {("all", "efficacy"): 0.0, ("all", "generality"): 0.0, ("all", "specificity"): 0.3}
    report = made_up(unit, shares)
    sizes = {role: int((report.role == role).sum()) for role in units.EDIT_ROLES}
    plain, half, every = score(report)
    n = sizes["efficacy"] + sizes["generality"]
    shown = {s: sum(round(s * sizes[role]) for role in ("efficacy", "generality")) for s in (0.4, 0.8)}
    assert half["gone"]["n"] == n
    assert half["efficacy"]["n"] + half["generality"]["n"] == n
    assert half["efficacy"]["mean"] == pytest.approx(1 - round(0.4 * sizes["efficacy"]) / sizes["efficacy"])
    assert half["gone"]["mean"] == pytest.approx(1 - shown[0.4] / n)
    assert half["gone_where_shown"]["n"] == shown[0.8]
    assert half["gone_where_shown"]["mean"] == pytest.approx(1 - shown[0.4] / shown[0.8])
    assert half["target"]["mean"] == pytest.approx(1 - shown[0.4] / n)
    assert half["specificity_change"]["mean"] == 0
    assert every["specificity_change"]["mean"] == pytest.approx(
        (round(0.3 * sizes["specificity"]) - round(0.9 * sizes["specificity"])) / sizes["specificity"]
    )
    assert plain["gone_where_shown"]["mean"] == 0
    assert ranked(report) == ["half", "all"], "specificity counts"
    assert merit(1.0, 0.9, 0.8) == 1.0, "more than the unedited model's is no gain"
    assert merit(1.0, 0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("gone", "change", "expected"),
    [
        ((0.99, 0.96), (0.0, -0.01), "met"),
        ((0.99, 0.90), (0.0, -0.01), "met by the estimates, open by their intervals"),
        ((0.99, 0.96), (-0.01, -0.04), "met by the estimates, open by their intervals"),
        ((0.94, 0.90), (0.0, -0.01), "not met"),
        ((0.99, 0.96), (-0.03, -0.06), "not met"),
    ],
)
def test_the_aim_is_met_or_not(gone, change, expected):
    row = {"gone": dict(zip(("mean", "low"), gone, strict=True))}
    row["specificity_change"] = dict(zip(("mean", "low"), change, strict=True))
    assert verdict(row) == expected


def test_the_reported_recipe_is_the_one_that_won_in_training(pipe):
    def reports(name, winner):
        found = {}
        for unit in EXPERIMENTS[name].units(pipe, chosen):
            best = {(winner(unit), role): 0.0 for role in ("efficacy", "generality")}
            found.setdefault(unit.attribute, []).append(made_up(unit, best | {("unedited", "specificity"): 0.5}))
        return {attribute: pooled(ones) for attribute, ones in found.items()}

    chosen = {}
    chosen["search"] = reports("search", lambda unit: "MLPs, last_subject, captions")
    chosen["finalists"] = reports("finalists", lambda unit: "MLPs, last_subject, captions, auto")
    for unit in EXPERIMENTS["best"].units(pipe, chosen):
        best = unit.recipes["best"]
        assert (best.preserve, best.tokens, best.regularization) == ("captions", "last_subject", "auto")
        assert [site.rsplit(".", 1)[1] for site in best.sites] == ["mlp"] * 6
    chosen["windows"] = reports("windows", lambda unit: "layers 3 and 4")
    assert {unit.recipes["loco"].layers for unit in EXPERIMENTS["methods"].units(pipe, chosen)} == {(3, 4)}


def test_experiments_come_after_those_that_they_need():
    assert with_needs(list(EXPERIMENTS)) == list(EXPERIMENTS)
    order = list(EXPERIMENTS)
    assert all(order.index(need) < order.index(name) for name in order for need in EXPERIMENTS[name].needs)
    assert with_needs(["best"]) == ["search", "finalists", "best"]
    with pytest.raises(ValueError, match="no experiment speed; there are windows, methods"):
        with_needs(["speed"])


def test_edits_by_place_are_ranked_against_the_map():
    sites = [f"text_encoder.{i}.mlp" for i in range(4)]
    recipes = {f"{site}, {tokens}": Recipe(sites=(site,), tokens=tokens) for site in sites for tokens in causal._EDITED}
    gone = {"last_subject": [0.1, 0.2, 0.9, 0.3], "from_subject": [0.4, 0.3, 0.2, 0.1]}
    rows = [{"model": "unedited", "gone": {"mean": 0.0}, "specificity": {"mean": 1.0}}] + [
        {"model": f"{site}, {tokens}", "gone": {"mean": share}, "specificity": {"mean": 1.0}}
        for tokens, shares in gone.items()
        for site, share in zip(sites, shares, strict=True)
    ]
    # By (site, token); what comes after the subject is missing in one of two cases.
    values = numpy.array([[0.1, 0, 0, 0], [0.2, 0, 0, 0], [0.8, 0, 0, 0], [0.3, 0.9, 0, 0]])
    second = values.copy()
    second[:, 1] = numpy.nan
    tokens = ["last_subject", "after", "eos", "padding"]
    effects = make_map([[values], [second]], sites=sites, token=tokens)
    last = causal.agreement(rows, recipes, effects, "last_subject")
    assert (last.rho, last.traced, last.rank) == (pytest.approx(1.0), sites[2], 1)
    assert last.effects == pytest.approx((0.1, 0.2, 0.8, 0.3))
    later = causal.agreement(rows, recipes, effects, "from_subject")
    assert later.effects == pytest.approx((0.1, 0.2, 0.8, 1.2))
    assert (later.rho, later.traced, later.rank) == (pytest.approx(-1.0), sites[3], 4)


def test_places_are_edited_for_every_attribute(pipe):
    found = {unit.name: unit for unit in EXPERIMENTS["layers"].units(pipe, {})}
    firsts = {f"{attribute}-{next(iter(pairs))}": attribute for attribute, pairs in units.REPORTED.items()}
    assert {name: unit.attribute for name, unit in found.items()} == firsts
    for name, unit in found.items():
        assert (unit.experiment, unit.n, unit.seed) == ("layers", 40 if unit.attribute == "pose" else 10, 2)
        assert unit.recipes == found["style-ink"].recipes
        assert not {trial.prompt for trial in unit.suite()} & {
            template.format(concept) for template in _CAPTIONS[unit.attribute] for concept in unit.pairs
        }, name
    assert [recipe.tokens for recipe in unit.recipes.values()] == ["last_subject"] * 12 + ["from_subject"] * 12


def test_maps_are_found_by_what_tracing_calls_them(tmp_path):
    effects = make_map([[[[[0.5, 0.5]]]]], sites=[FIRST], token=["eos"], metric=["clip_score", "probe_probability"])
    save_map(effects, tmp_path / "color.text.nc")
    assert causal.load_map(tmp_path, "background").sizes == {"case": 1, "draw": 1, "site": 1, "token": 1}
    assert causal.load_map(tmp_path, "style") is None


def test_edits_that_do_nothing_anywhere_agree_with_no_map():
    rows = [{"model": m, "gone": {"mean": 0.0}, "specificity": {"mean": 1.0}} for m in ("unedited", "a", "b")]
    edits = {"a": Recipe(sites=(FIRST,), tokens="last_subject"), "b": Recipe(sites=(SECOND,), tokens="last_subject")}
    effects = make_map([[[[0.1], [0.2]]]], sites=[FIRST, SECOND], token=["last_subject"])
    found = causal.agreement(rows, edits, effects, "last_subject")
    assert numpy.isnan([found.rho, found.p]).all()
    assert f"| pose | last_subject | all alike |  | {SECOND} | 1 of 2 |" in pages._agreements({"pose": [found]})
    figure = figures.draw_agreements({name: [found] for name in units.REPORTED}, "")
    assert [ax.get_subplotspec().rowspan.start for ax in figure.axes] == [0] * 4 + [1] * 3
    reproduce.matplotlib.pyplot.close(figure)


def test_tables_figures_and_data_tell_the_same(pipe, tmp_path, monkeypatch):
    few = functools.partial(editing.summarize_evaluation, n_resamples=50)
    monkeypatch.setattr(editing, "summarize_evaluation", few)
    runner = types.SimpleNamespace(pipe=pipe, run=made_up, path=lambda unit: unit.name)
    recipes = {"fixed": Recipe(), "best": Recipe(sites=(FIRST,), regularization="auto")}
    best = units.reported_units("best", {"style": recipes}, 5)
    best_experiment = dataclasses.replace(EXPERIMENTS["best"], units=lambda pipe, reports: best)
    monkeypatch.setitem(EXPERIMENTS, "best", best_experiment)
    results = reproduce.run(runner, ["lambdas", "concepts", "best"])
    reproduce.write(results, {}, {"steps": 1}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json", "report.md", "lambdas_quickfix.png", "lambdas_uce.png", "concepts.png", "best.png"
    }  # fmt: skip
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["goal"]["style"]["verdict"] == "not met"
    groups = [(result["experiment"], result["group"]) for result in record["results"]]
    assert groups[:3] == [("lambdas", "style"), ("lambdas", "object"), ("concepts", "1 at once")]
    text = (tmp_path / "report.md").read_text()
    assert f"style: **not met**, by method quickfix, sites {FIRST}, templates paper, preserve nothing" in text
    (row,) = (row for row in record["results"][-1]["rows"] if row["model"] == "best")
    assert f"| best | {pages.in_words(row['gone'])} |" in text
