"""Which weights are set to 0, and verdicts on pictures in which the truth was planted."""

import json

import pytest

import mediation
from benchmarks.reproduce.attributions import recipes, selectivity
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from editing.ablation import CONTROLS
from tests.attributions import judged

CAD, RANDOM = named("cad", max(RATIOS)), named("random", max(RATIOS))


def test_recipes_take_as_many_weights_for_controls_and_score_once(small_pipe, monkeypatch):
    given, real = [], mediation.attribute
    monkeypatch.setattr(mediation, "attribute", lambda *a, **k: given.append(a) or real(*a, **k))
    recipes.scored.cache_clear()
    options = {"objective": "erase", "prompt": "a ink cat", "ratio": 0.02, "num_inference_steps": 1}
    edits = {
        scores: recipes.Ablation(scores=scores, **options).make(small_pipe, {}, "") for scores in ("cad", *CONTROLS)
    }
    recipes.scored.cache_clear()
    assert len(given) == 1
    counts = {
        scores: {name: len(update.indices) for name, update in edit.updates.items()} for scores, edit in edits.items()
    }
    assert counts["random"] == counts["magnitude"] == counts["cad"]
    assert edits["cad"].metadata["method"] == "cad_erase"
    assert [edit.metadata.get("control") for edit in edits.values()] == [None, *CONTROLS]


def test_units_have_every_ratio_with_every_control():
    for objective, units in recipes.ablation_units().items():
        assert [unit.pairs for unit in units] == [{"ink": "noto"}, {"cat": "dog"}]
        for unit in units:
            assert {named(scores, ratio) for scores in ("cad", *CONTROLS) for ratio in RATIOS} < set(unit.recipes)
            assert ("quickfix" in unit.recipes) == (objective == "erase")
            assert f'"{objective}"' in json.dumps(unit.describe()), "what decides on pictures is in their file"
            (source,) = unit.pairs
            prompts = [trial.prompt for trial in unit.suite() if trial.role != "specificity"]
            assert len(prompts) > 20
            assert all(source in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("objective", "unedited", "shares", "expected"),
    [
        ("erase", (0.8, 0.9), {CAD: (0.2, 0.9)}, REPRODUCED),
        ("erase", (0.8, 0.9), {CAD: (0.2, 0.9), RANDOM: (0.2, 0.9)}, NOT_REPRODUCED),
        ("erase", (0.8, 0.9), {CAD: (0.2, 0.9), RANDOM: (0.25, 0.9)}, INCONCLUSIVE),
        ("erase", (0.8, 1.0), {CAD: (0.0, 0.0)}, NOT_REPRODUCED),
        ("erase", (0.8, 0.9), {}, NOT_REPRODUCED),
        ("amplify", (0.5, 0.9), {CAD: (0.95, 0.9)}, REPRODUCED),
        ("amplify", (0.5, 0.9), {CAD: (0.3, 0.9)}, NOT_REPRODUCED),
    ],
)
def test_what_is_selective(objective, unedited, shares, expected):
    found = selectivity.measure(judged({"unedited": unedited} | shares), objective)
    claim = selectivity.is_selective(found, objective)
    *weaker, strongest = (one.verdict for one in claim.findings)
    assert strongest == expected
    assert set(weaker) == {NOT_REPRODUCED}, "they change nothing"
    assert claim.verdict == expected


def test_selectivity_is_the_change_of_both():
    shares = {"unedited": (0.8, 0.9), CAD: (0.2, 0.7), RANDOM: (0.7, 0.9)}
    one = selectivity.measure(judged(shares), "erase")[-1]
    means = (one.target.mean, one.bystanders.mean, one.selective.mean, one.controls["random"].mean)
    assert means == pytest.approx((0.6, -0.2, 0.4, 0.1))
    assert one.advantages["random"].mean == pytest.approx(0.3)
    for estimate in (one.target, one.bystanders, one.selective, one.advantages["random"]):
        assert estimate.low < estimate.mean < estimate.high


def test_ruin_is_not_selective():
    one = selectivity.measure(judged({"unedited": (0.8, 1.0), CAD: (0.0, 0.0)}), "erase")[-1]
    assert one.target.low > 0
    found = selectivity.judge(one.target, one.selective, list(one.advantages.values()))
    assert found == (NOT_REPRODUCED, "bystanders suffer as much")
