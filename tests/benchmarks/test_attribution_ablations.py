"""Which weights are set to 0, and verdicts on pictures in which the truth was planted."""

import json

import pytest

import mediation
from benchmarks.reproduce.attributions import recipes, selectivity
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from editing.ablation import CONTROLS
from mediation import bundled
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
    pairs = {
        "erase": [{"ink": "noto"}, {"cat": "dog"}],
        "amplify": [{"fluent": "noto"}, {"upside down": "upright"}],
    }
    for objective, units in recipes.ablation_units().items():
        assert [unit.pairs for unit in units] == pairs[objective]
        for unit in units:
            assert {named(scores, ratio) for scores in ("cad", *CONTROLS) for ratio in RATIOS} < set(unit.recipes)
            assert ("quickfix" in unit.recipes) == (objective == "erase")
            assert f'"{objective}"' in json.dumps(unit.describe()), "what decides on pictures is in their file"
            assert ("n_pictures" in unit.describe()["recipes"][CAD]) == (objective == "amplify")
            (source,) = unit.pairs
            prompts = [trial.prompt for trial in unit.suite() if trial.role != "specificity"]
            assert len(prompts) > 20
            assert all(source in prompt for prompt in prompts)


@pytest.mark.parametrize("concept", recipes.WEAK_CONCEPTS, ids=lambda one: one.name)
def test_amplified_are_pictures_that_show_the_concept(concept, small_pipe, monkeypatch):
    images = recipes.pictures(concept.attribute, concept.name, 24)
    assert images.shape == (24, 3, 64, 64)
    probe = bundled.load_probe()
    shown = probe.labels(concept.attribute).index(concept.name)
    read = probe.probabilities(images, concept.attribute).argmax(-1)
    assert (read == shown).sum() >= 22
    given, real = [], mediation.attribute
    monkeypatch.setattr(mediation, "attribute", lambda *a, **k: given.append(k["images"]) or real(*a, **k))
    recipes.scored.cache_clear()
    recipe = recipes.PictureAblation("amplify", "a ink cat", 0.02, num_inference_steps=1, n_pictures=2)
    recipe.make(small_pipe, {}, "")
    recipes.scored.cache_clear()
    assert len(given[0]) == 2


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


@pytest.mark.parametrize(
    ("objective", "unedited", "shares", "reason"),
    [
        ("amplify", 1.0, {}, "no room: shown in all unedited pictures"),
        ("amplify", 1.0, {CAD: (0.5, 0.9)}, "no room: shown in all unedited pictures"),
        ("amplify", 0.975, {CAD: (1.0, 0.9)}, "no room: shown in all but 2% of unedited pictures"),
        ("erase", 0.0, {CAD: (0.5, 0.9)}, "no room: missing in all unedited pictures"),
    ],
)
def test_without_room_nothing_follows(objective, unedited, shares, reason):
    claim = selectivity.is_selective(
        selectivity.measure(judged({"unedited": (unedited, 0.9)} | shares), objective), objective
    )
    assert {one.verdict for one in claim.findings} == {claim.verdict} == {INCONCLUSIVE}
    assert all(one.reason.startswith(reason) for one in claim.findings)


@pytest.mark.parametrize(("objective", "unedited", "room"), [("erase", 0.8, 0.8), ("amplify", 0.3, 0.7)])
def test_room_is_the_largest_change_there_could_be(objective, unedited, room):
    ideal = float(objective == "amplify")
    one = selectivity.measure(judged({"unedited": (unedited, 0.9), CAD: (ideal, 0.9)}), objective)[-1]
    assert one.room == one.target
    assert one.room.mean == pytest.approx(room)


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
    found = selectivity.judge(one.room, one.target, one.selective, list(one.advantages.values()))
    assert found == (NOT_REPRODUCED, "bystanders suffer as much")
