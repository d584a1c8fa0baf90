"""Predicted and true changes of J, where scores lie, and verdicts on reports in which the truth was planted."""

import math

import numpy
import pytest
import torch
from scipy import stats

import mediation
from benchmarks.reproduce.attributions import correlations, predictions, whereabouts
from benchmarks.reproduce.attributions.recipes import RATIOS, named
from benchmarks.reproduce.claims import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Estimate
from benchmarks.reproduce.storing import stored
from mediation.objectives import erase_objective
from mediation.sampling import Sampling
from tests.attributions import planted_scores, predicted_changes

PROMPT = "a ink cat"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Intervals of planted maps need no more."""
    monkeypatch.setattr(whereabouts, "_N_RESAMPLES", 30)


@pytest.fixture(scope="module")
def ablated(small_pipe):
    """A report with few ablations, and whether every weight came back."""
    question = predictions.Question("ink", PROMPT, "erase", n_random={0.01: 3, 0.1: 2}, n_latents=1)
    before = {name: value.clone() for name, value in small_pipe.unet.state_dict().items()}
    report = question.run(small_pipe)
    return report, all(torch.equal(value, before[name]) for name, value in small_pipe.unet.state_dict().items())


def test_every_ablation_is_there_and_leaves_nothing(small_pipe, ablated):
    report, is_same = ablated
    assert is_same
    kinds = report.kind.values.tolist()
    assert [kinds.count(kind) for kind in ("random", "layer", "top")] == [5, 29, 4 * len(RATIOS)]
    sizes = [p.numel() for name, p in small_pipe.unet.named_parameters() if ".ff." in name and p.ndim > 1]
    n_random = report.n_weights.values[report.kind.values == "random"].tolist()
    assert n_random == [round(0.01 * sum(sizes))] * 3 + [round(0.1 * sum(sizes))] * 2


def test_predicted_and_true_changes_are_those_of_j(small_pipe, ablated):
    """Of a layer, by the sums of its scores, and by J once the layer's weights are 0."""
    report, _ = ablated
    layers = report.isel(ablation=numpy.flatnonzero(report.kind.values == "layer"))
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "progress": False}
    sums = mediation.attribute(small_pipe, PROMPT, parameters="unet.*", **options).to_dataset()
    assert layers.label.values.tolist() == sums.site.values.tolist()
    expected = -(sums.positive + sums.negative).values
    for name in ("predicted", "shuffled"):  # in a whole layer, whichever weight has a score
        numpy.testing.assert_allclose(layers[name].values, expected, rtol=1e-4, atol=1e-6 * abs(expected).max())

    sampling = Sampling(1, 3.0)
    objective = erase_objective(small_pipe, PROMPT, "", seeds=[0], sampling=sampling, batch_size=1, progress=False)
    whole = objective.value(small_pipe)
    assert report.attrs["value"] == pytest.approx(whole)
    (site,) = mediation.sites(small_pipe, name="unet.up.1.0.feed_forward")
    weights = [p for p in site.module(small_pipe).parameters() if p.ndim > 1]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.zero_()
        change = objective.value(small_pipe) - whole
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data.copy_(values)
    place = layers.label.values.tolist().index(site.name)
    assert layers.actual.values[place] == pytest.approx(change, rel=1e-3, abs=1e-6 * whole)
    assert layers.squares.values[place] == pytest.approx(sum(float(one.square().sum()) for one in kept), rel=1e-4)


def test_the_best_weights_are_as_many_as_controls(ablated):
    top = {one.label: one for one in correlations.choices(ablated[0])}
    for ratio in RATIOS:
        cad, random, magnitude = (top[named(scores, ratio)] for scores in ("cad", "random", "magnitude"))
        assert cad.n_weights == random.n_weights == magnitude.n_weights
        assert cad.predicted < min(0, random.predicted, magnitude.predicted), "no others are predicted to do more"


def test_random_places_are_a_share_of_all_weights():
    scores = {"unet.a": torch.zeros(30), "unet.b": torch.zeros(10, 7)}
    found = mediation.Attribution(scores, scores, {}, {}, {})
    counts = torch.zeros(100)
    for seed in range(300):
        places = predictions.random_places(found, 0.2, torch.Generator().manual_seed(seed))
        assert sum(map(len, places.values())) == 20
        for name, indices in places.items():
            assert (indices.diff() > 0).all()
            counts[indices + (30 if name == "unet.b" else 0)] += 1
    assert counts.sum() == 20 * 300
    assert counts.min() > 25, "60 on average, with a deviation of 7"
    assert counts.max() < 95


def test_correlations_are_scipys_within_each_kind():
    report = predicted_changes()
    random, layers = correlations.summarize(report)
    assert (random.n, layers.n) == (360, 28)
    predicted, actual, shuffled, squares = (
        report[name].values for name in ("predicted", "actual", "shuffled", "squares")
    )
    assert random.pearson.mean == pytest.approx(stats.pearsonr(predicted[:360], actual[:360]).statistic)
    assert random.spearman.mean == pytest.approx(stats.spearmanr(predicted[:360], actual[:360]).statistic)
    assert random.control.mean == pytest.approx(stats.pearsonr(shuffled[:360], actual[:360]).statistic)
    assert layers.pearson.mean == pytest.approx(stats.pearsonr(predicted[360:388], actual[360:388]).statistic)
    assert layers.control.mean == pytest.approx(stats.pearsonr(squares[360:388], actual[360:388]).statistic)
    assert random.slope == pytest.approx(numpy.polyfit(predicted[:360], actual[:360], 1)[0])
    width = random.pearson.high - random.pearson.low
    assert width == pytest.approx(2 * 1.96 * (1 - 0.5) / 360**0.5, rel=0.3), "as large samples have it, for r² = 0.5"
    claim = correlations.predicts({"erase ink": [random, layers]})
    assert claim.verdict == REPRODUCED
    assert claim.findings[0].place == "360 ablations of 0.01 of the weights at random"
    (choice, *_) = correlations.choices(report)
    assert choice.actual == pytest.approx(actual[388] / 4)


@pytest.mark.parametrize(
    ("found", "control", "expected"),
    [
        ((0.6, 0.7), (-0.1, 0.1), REPRODUCED),
        ((0.4, 0.7), (-0.1, 0.1), INCONCLUSIVE),
        ((0.2, 0.4), (-0.1, 0.1), NOT_REPRODUCED),
        ((0.6, 0.7), (0.5, 0.65), INCONCLUSIVE),
        ((math.nan, math.nan), (0.0, 0.1), INCONCLUSIVE),
    ],
)
def test_the_rule_of_correlations(found, control, expected):
    assert correlations.judge(Estimate(0.5, *found), Estimate(0, *control))[0] == expected


@pytest.fixture(scope="module")
def sums(small_pipe):
    return whereabouts.run(small_pipe, ["a cat", "a ink dog"], num_inference_steps=1)


def test_sums_are_those_of_each_concept(small_pipe, sums, tmp_path):
    assert sums.concept.values.tolist() == ["a cat", "a ink dog"]
    options = {"parameters": "unet.*", "num_inference_steps": 1, "progress": False}
    for i, prompt in enumerate(sums.concept.values.tolist()):
        alone = mediation.attribute(small_pipe, prompt, **options).to_dataset()
        for name in ("positive", "negative"):
            numpy.testing.assert_allclose(sums[name].isel(case=i), alone[name], rtol=1e-4)
    loaded = stored(tmp_path / "sums.nc", {}, lambda: sums)
    for amount in whereabouts.AMOUNTS:
        effects = mediation.indirect_effect(whereabouts.of_amount(loaded, amount)).isel(draw=0)
        expected = abs(sums[amount]).values
        numpy.testing.assert_allclose(effects.transpose("case", "site"), expected, atol=1e-9 * expected.max())


def test_shares_are_parts_of_all_scores(sums):
    found = {one.component: one for one in whereabouts.shares("style", sums)}
    assert set(found) == {"resnet", "self_attention", "cross_attention", "feed_forward"}
    for sign in ("positive", "negative"):
        assert sum(getattr(one, sign).mean for one in found.values()) == pytest.approx(1)
        resnets = sums[sign].isel(site=numpy.flatnonzero(sums.component.values == "resnet"))
        expected = float((resnets.sum("site") / sums[sign].sum("site")).mean())
        assert getattr(found["resnet"], sign).mean == pytest.approx(expected)
    assert sum(one.weights for one in found.values()) == pytest.approx(1)


def test_layers_are_parts_of_their_component_in_execution_order(small_pipe, sums):
    layers = whereabouts.layer_shares("style", sums)
    sites = mediation.sites(small_pipe, network="unet")
    assert [(one.site, one.component, one.layer) for one in layers if one.layer >= 0] == [
        (site.name, site.component, site.layer) for site in sites
    ]
    for whole in whereabouts.shares("style", sums):
        group = [one for one in layers if one.component == whole.component]
        assert len(group) > 1
        for sign in ("positive", "negative"):
            assert sum(getattr(one, sign).mean for one in group) == pytest.approx(getattr(whole, sign).mean)
        assert sum(one.weights for one in group) == pytest.approx(whole.weights)


@pytest.mark.parametrize(
    ("follows", "expected", "sign"), [("positive", REPRODUCED, 1), ("negative", NOT_REPRODUCED, -1)]
)
def test_scores_lie_where_the_map_shows_effects_or_elsewhere(follows, expected, sign):
    amounts, causal = planted_scores(follows)
    claim, negatives = whereabouts.positive_where_causal({"style": amounts, "object": amounts}, {"style": causal})
    (positive,), (negative,) = claim.findings, negatives  # of objects, there is no map
    assert claim.verdict == positive.verdict == expected
    assert sign * positive.estimate.mean > 0.9
    assert sign * negative.estimate.mean < -0.9


def test_scores_that_only_follow_the_size_of_sites_are_told_apart():
    amounts, causal = planted_scores("n_weights")
    claim, _ = whereabouts.positive_where_causal({"style": amounts}, {"style": causal})
    assert claim.findings[0].control.mean > 0.9
    assert claim.verdict != REPRODUCED


def test_without_causal_maps_nothing_is_claimed():
    claim, negatives = whereabouts.positive_where_causal({"style": planted_scores("positive")[0]}, {})
    assert (claim.findings, claim.verdict, negatives) == ((), INCONCLUSIVE, [])


@pytest.mark.parametrize(
    ("found", "size", "expected"),
    [
        ((0.3, 0.7), 0.1, REPRODUCED),
        ((0.3, 0.7), 0.4, INCONCLUSIVE),
        ((-0.1, 0.7), -0.5, INCONCLUSIVE),
        ((-0.7, -0.1), 0.0, NOT_REPRODUCED),
        ((math.nan, math.nan), 0.0, INCONCLUSIVE),
    ],
)
def test_the_rule_of_places(found, size, expected):
    assert whereabouts.judge(Estimate(0, *found), Estimate(size, size - 0.1, size + 0.1))[0] == expected
