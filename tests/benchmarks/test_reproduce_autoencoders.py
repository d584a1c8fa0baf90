"""Arms differ in what they should, and verdicts follow from numbers."""

import contextlib
import dataclasses
import json

import matplotlib.figure
import numpy
import pytest
import torch
import xarray

import mediation
from benchmarks.reproduce import autoencoders
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from benchmarks.reproduce.saes import preparing, trials, verdicts
from benchmarks.reproduce.saes.preparing import BLOCKS, STAGES, Settings, places
from benchmarks.reproduce.simultaneous import ratio_intervals
from mediation import SparseAutoencoder
from mediation.autoencoders.concepts import _example

pytestmark = pytest.mark.usefixtures("few_resamples")


def records(success):
    """Records of all trials; `success` gives the share of successes by (experiment, stage, arm).

    Of equal shares the same pictures succeed, as they do where steering changes nothing.
    """
    rng = numpy.random.default_rng(0)
    found = {}
    for experiment in trials.EXPERIMENTS:
        for block in BLOCKS:
            order = rng.permutation(100)
            for stage in STAGES:
                by_arm = {
                    arm: (order < 100 * success(experiment, stage, arm)).astype(int).tolist() for arm in trials.ARMS
                }
                found[experiment, block, stage] = {"success": by_arm, "strength": 1.0}
    return found


CONTROLS = ("chance_miou", "constant_miou")


def layouts(miou, control=(0.3, 0.3)):
    rng = numpy.random.default_rng(1)
    keys = list(places(BLOCKS))
    values = miou + 0.05 * rng.normal(size=(len(keys), 80))
    blocks, stages, branches = zip(*keys, strict=True)
    controls = {name: (("autoencoder", "case"), values * 0 + one) for name, one in zip(CONTROLS, control, strict=True)}
    return xarray.Dataset(
        {"miou": (("autoencoder", "case"), values), **controls},
        coords={
            "block": ("autoencoder", list(blocks)),
            "stage": ("autoencoder", list(stages)),
            "branch": ("autoencoder", list(branches)),
        },
    )


def as_in_the_paper(experiment, stage, arm):
    if arm != "concept":
        return 0.25
    return {("quadrant", "early"): 0.8, ("style", "middle"): 0.9}.get((experiment, stage), 0.25)


def by_name(claims):
    return {claim.name: claim.verdict for claim in claims}


def test_numbers_as_in_the_paper_reproduce_its_claims():
    found = by_name(verdicts.all_claims(layouts(0.6), records(as_in_the_paper)))
    names = {
        "prediction",
        "composition_early",
        "composition_settled",
        "composition_final",
        "style_middle",
        "style_final",
    }
    assert found == dict.fromkeys(names, REPRODUCED)


@pytest.mark.parametrize(
    ("early", "middle", "verdict"),
    [
        (0.95, 0.25, REPRODUCED),
        (0.95, 0.70, NOT_REPRODUCED),  # less than before, and far from settled
        (0.95, 0.02, NOT_REPRODUCED),  # moved, though not where it should
        (0.95, 0.35, INCONCLUSIVE),
        (0.25, 0.25, INCONCLUSIVE),  # what never moved cannot be seen to settle
        (0.25, 0.70, NOT_REPRODUCED),
    ],
)
def test_composition_is_settled_if_only_early_steering_moves_it(early, middle, verdict):
    def success(experiment, stage, arm):
        return {"early": early, "middle": middle}.get(stage, 0.25) if arm == "concept" else 0.25

    assert by_name(verdicts.all_claims(layouts(0.6), records(success)))["composition_settled"] == verdict


def test_numbers_without_effect_refute_them():
    found = by_name(verdicts.all_claims(layouts(0.3), records(lambda experiment, stage, arm: 0.25)))
    assert found["prediction"] == NOT_REPRODUCED
    assert REPRODUCED not in {found[name] for name in ("composition_early", "composition_settled", "style_middle")}


def test_a_prediction_that_a_constant_layout_makes_too_is_none():
    found = by_name(verdicts.all_claims(layouts(0.6, (0.3, 0.65)), records(as_in_the_paper)))
    assert found["prediction"] == NOT_REPRODUCED


def test_few_pictures_that_differ_leave_intervals_finite():
    """Many resamples of 132 pictures have none of the one or two that differ."""
    flips = {n: (numpy.arange(132) < n).astype(float) for n in (0, 1, 2, 30)}
    found = verdicts.estimates(flips)
    for n, one in found.items():
        assert one.mean == pytest.approx(n / 132)
        assert one.high - one.mean >= numpy.log(20 * len(flips)) / 132
        assert one.high - one.low < 0.3
    assert found[0].kind == "negligible"
    assert found[30].kind == "causal"


def test_success_that_random_latents_have_too_is_no_effect():
    def success(experiment, stage, arm):
        return 0.25 if arm == "unsteered" else 0.9

    found = by_name(verdicts.all_claims(layouts(0.6), records(success)))
    assert found["composition_early"] in (NOT_REPRODUCED, INCONCLUSIVE)
    assert found["style_final"] == NOT_REPRODUCED


def test_intervals_of_a_claim_hold_for_all_its_blocks_and_controls_together():
    """They are those of one estimate of all differences, and wider than those of each block alone."""

    def success(experiment, stage, arm):
        return {"concept": 0.7, "random latents": 0.3, "random directions": 0.2}.get(arm, 0.25)

    found, blocks = records(success), list(BLOCKS)
    arms = ("random latents", "random directions", "unsteered")
    differences = numpy.array(
        [
            numpy.subtract(found["style", block, "middle"]["success"]["concept"], one)
            for block in blocks
            for one in (found["style", block, "middle"]["success"][arm] for arm in arms)
        ]
    ).T
    options = {"confidence": 0.95, "least_error": 0.01}
    expected = ratio_intervals(differences, numpy.ones(100), **options)
    claims = {claim.name: claim for claim in verdicts.all_claims(layouts(0.6), found)}
    for i, finding in enumerate(claims["style_middle"].findings):
        for j, arm in enumerate(arms):
            one = verdicts.Estimate(*expected[:, 3 * i + j])
            assert f"{one} above {arm}" in finding.reason
            (alone,) = ratio_intervals(differences[:, [3 * i + j]], numpy.ones(100), **options).T
            assert alone[2] - alone[1] < one.high - one.low


def test_whatever_is_missing_is_made_and_the_rest_is_found_again(small_pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mediation, "load_pipeline", lambda: small_pipe)
    monkeypatch.setattr(trials, "STRENGTHS", (1.0,))
    monkeypatch.setattr(trials, "QUADRANTS", trials.QUADRANTS[:2])
    settings = Settings(steps=3, images=6, positions=200, k=2, labelled=4, watched=3, tuned=1, objects=2)
    autoencoders.run(settings, ["down"], ["quadrant"], tmp_path)
    first = capsys.readouterr().out
    record = json.loads((tmp_path / "steering" / "quadrant.down.early.json").read_text())
    assert {arm: len(found) for arm, found in record["success"].items()} == dict.fromkeys(trials.ARMS, 2 * 2)
    assert None not in record["success"]["concept"]
    page = (tmp_path / "claims.md").read_text()
    assert page.startswith("# Claims on concepts in diffusion models, tested")
    assert page.count("## ") == 4, "the claims on styles were not tested"
    assert (tmp_path / "tables.md").read_text().count("| quadrant | down |") == len(STAGES)
    for name in ("collect_activations", "fit_sae", "concept_dictionaries"):
        monkeypatch.setattr(mediation, name, None)
    monkeypatch.setattr(trials.Studio, "draw", None)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path, **options: None)  # the same figures
    autoencoders.run(settings, ["down"], ["quadrant"], tmp_path)
    second = capsys.readouterr().out
    assert first.splitlines()[-4:] == second.splitlines()[-4:], "the verdicts"
    with pytest.raises(ValueError, match="other settings"):
        autoencoders.run(dataclasses.replace(settings, steps=4), ["down"], ["quadrant"], tmp_path)


@pytest.mark.parametrize(("wrong", "message"), [({"images": 0}, "images must be"), ({"objects": 40}, "39 objects")])
def test_settings_that_cannot_be_met_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_arms_steer_by_what_they_are_called():
    sae, dictionary = SparseAutoencoder(4, 2, 1).requires_grad_(False), _example()
    dictionary = dictionary.assign(n=("latent", [3, 3]))
    same, latents = trials.steered_by(sae, dictionary, "object: cat", "concept", seed=0)
    assert same is sae
    assert latents == [0]
    same, others = trials.steered_by(sae, dictionary, "object: cat", "random latents", seed=0)
    assert same is sae
    assert others == [1]
    other, latents = trials.steered_by(sae, dictionary, "object: cat", "random directions", seed=0)
    assert latents == [0]
    assert not torch.equal(other.decoder[0], sae.decoder[0])
    assert torch.equal(other.decoder[1], sae.decoder[1])
    torch.testing.assert_close(other.decoder.norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="no arm"):
        trials.steered_by(sae, dictionary, "object: cat", "magic", seed=0)


@pytest.mark.parametrize(
    ("experiment", "stage"), [("quadrant", "early"), ("style", "middle"), ("background", "middle")]
)
def test_every_stage_has_the_strength_that_is_best_where_steering_works(tmp_path, monkeypatch, experiment, stage):
    """Elsewhere the strongest is the luckiest."""
    asked = []

    def successes(self, sae, dictionary, trial, span, arm, strength):
        asked.append((span, arm, strength))
        works = span == STAGES[stage]
        lucky = strength == (2.0 if works else 8.0)
        return numpy.arange(10) < (9 if lucky else 2)

    monkeypatch.setattr(trials.Studio, "successes", successes)
    named = {("mid", one, "cond"): _example() for one in STAGES}
    studio = trials.Studio(None, Settings())
    found = trials.run(studio, dict.fromkeys(named), named, experiment, "mid", tmp_path, "model")
    assert {one: record["strength"] for one, record in found.items()} == dict.fromkeys(STAGES, 2.0)
    assert {one: sum(record["success"]["concept"]) for one, record in found.items()} == {
        one: 9 if one == stage else 2 for one in STAGES
    }
    tuning = [(span, strength) for span, _, strength in asked[: len(trials.STRENGTHS)]]
    assert tuning == [(STAGES[stage], strength) for strength in trials.STRENGTHS]
    assert {strength for _, _, strength in asked[len(trials.STRENGTHS) :]} == {2.0}
    again = trials.run(studio, {}, named, experiment, "mid", tmp_path, "model")
    assert again == found
    with pytest.raises(ValueError, match="other settings"):
        trials.run(studio, {}, named, experiment, "mid", tmp_path, "another model")


def test_pictures_without_a_latent_to_steer_by_do_not_count(tmp_path, monkeypatch):
    """Of the two objects that the dictionary knows, one is drawn steered; the third is not steered, and no failure."""
    drawn = []

    def draw(self, trial, number):
        drawn.append(number)
        return torch.full((len(trial.objects), 3, 8, 8), float(number))

    monkeypatch.setattr(trials.Studio, "draw", draw)
    monkeypatch.setattr(trials.editing, "steer", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(trials, "shows", lambda image, experiment, target: bool(image.max() > 0))
    trial = trials.Trial("object", ("ball", "kite"), ("cat", "dog", "fox"), seed=0)
    sae, dictionary = SparseAutoencoder(4, 2, 1).requires_grad_(False), _example().assign(n=("latent", [3, 3]))
    options = {"stage": (0.6, 1.0), "strength": 1.0}
    for arm in ("concept", "random latents", "random directions"):
        found = trials.Studio(None, Settings()).successes(sae, dictionary, trial, arm=arm, **options)
        numpy.testing.assert_array_equal(found, [0, 0, 1, 1, numpy.nan, numpy.nan])
    assert drawn == [0, 1] * 3
    unsteered = trials.Studio(None, Settings()).successes(sae, dictionary, trial, arm="unsteered", **options)
    numpy.testing.assert_array_equal(unsteered, [0, 0, 1, 1, 1, 1])


def test_pictures_that_do_not_count_are_counted():
    """With half of the pictures unsteered, success is that of the other half, and so are its controls'."""
    found = records(as_in_the_paper)
    for record in found.values():
        for arm, success in record["success"].items():
            ends = {"concept": [None] * 100, "unsteered": [1] * 100}.get(arm, [None] * 100)
            record["success"][arm] = success + ends
    claims = {claim.name: claim for claim in verdicts.all_claims(layouts(0.6), found)}
    assert {claim.verdict for claim in claims.values()} == {REPRODUCED}
    (finding, *_) = claims["style_final"].findings
    assert (finding.estimate.mean, finding.control.mean) == (0.25, 0.25)
    assert "100 of 200 pictures have no latent to steer by" in finding.reason
    summary = xarray.Dataset(coords={"autoencoder": []})
    assert "| quadrant | down | early | 1.0 | 200 | 100 | 0.80 [" in verdicts.tables(summary, {}, found)
    for record in found.values():
        record["success"]["concept"] = [None] * 200
    claims = {claim.name: claim for claim in verdicts.all_claims(layouts(0.6), found)}
    assert {claim.verdict for name, claim in claims.items() if name != "prediction"} == {INCONCLUSIVE}


def test_a_strength_is_chosen_by_the_pictures_that_were_steered(tmp_path, monkeypatch):
    """Half of the pictures have no latent; with all of them missing, the strongest is taken, and nothing fails."""

    def successes(self, sae, dictionary, trial, span, arm, strength):
        shown = numpy.where(numpy.arange(10) < 5, float(strength == 2.0), numpy.nan)
        return shown if dictionary is known else numpy.full(10, numpy.nan)

    monkeypatch.setattr(trials.Studio, "successes", successes)
    known, unknown = _example(), _example()
    for dictionary, strength in ((known, 2.0), (unknown, 8.0)):
        named = {("mid", stage, "cond"): dictionary for stage in STAGES}
        folder = tmp_path / str(strength)
        studio = trials.Studio(None, Settings())
        found = trials.run(studio, dict.fromkeys(named), named, "style", "mid", folder, "model")
        assert found["final"]["strength"] == strength
        expected = [1.0] * 5 + [None] * 5 if dictionary is known else [None] * 10
        assert found["final"]["success"]["concept"] == expected
        assert "NaN" not in (folder / "style.mid.tuning.json").read_text()


@pytest.mark.parametrize(
    ("centre", "speck", "expected"),
    [
        ((16, 48), None, "top right"),
        ((32, 32), None, None),
        ((30, 34), None, None),  # a little off the middle
        ((32, 32), (60, 2), None),  # a speck in a corner moves nothing
        ((48, 16), (2, 60), "bottom left"),
        (None, None, None),
    ],
)
def test_an_object_is_where_most_of_it_is(centre, speck, expected):
    image = torch.ones(3, 64, 64)
    for (y, x), radius in ((one, r) for one, r in ((centre, 12), (speck, 2)) if one):
        image[:, y - radius : y + radius, x - radius : x + radius] = 0
    found = [target for target in trials.QUADRANTS if trials.shows(image, "quadrant", target)]
    assert found == ([expected] if expected else [])


def test_random_directions_explain_little_and_all_directions_everything():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=rng)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=rng), dim=1)
    found = [preparing.explained_along(directions, x, k) for k in (1, 4, 16, 32)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1)
    centred = (x - x.mean(0)).numpy().astype(float)
    along = ((centred @ directions.numpy().T) ** 2).max(1).sum() / (centred**2).sum()  # of one: its projection
    positive = numpy.maximum(centred @ directions.numpy().T, 0).max(1)
    assert found[0] == pytest.approx((positive**2).sum() / (centred**2).sum(), rel=1e-5)
    assert found[0] <= along


def test_strengths_are_chosen_on_other_objects_and_noise():
    for experiment in trials.EXPERIMENTS:
        tuning, reported = trials.trials(experiment, Settings(draws=2))
        assert not set(tuning.objects) & set(reported.objects)
        seeds = [set(range(trial.seed, trial.first_seed(len(trial.targets)))) for trial in (tuning, reported)]
        n_objects = len(tuning.objects), 2 * len(reported.objects)
        assert [len(one) for one in seeds] == [n * len(tuning.targets) for n in n_objects]
        assert not seeds[0] & seeds[1]
