"""Maps are made once and cost what is announced; how estimates agree with exact maps, counted by hand."""

import dataclasses
import math
import shutil

import numpy
import pytest
import xarray
from scipy import stats

import mediation
from benchmarks.reproduce import maps
from benchmarks.reproduce.attributions import fidelity, variants
from benchmarks.reproduce.claims import Estimate
from benchmarks.speed.sweeps import counting
from mediation import Case, GaussianNoise, LatentDistance, ReplaceSubject
from mediation.mapfiles import save_map
from tests.attributions import EXACT, NAMES, REVERSED, with_metric
from tests.linear import linear_metric, linear_pipeline
from tests.maps import make_map

CASES = (Case("a photo of a cat in ink style", subject="cat", corruption=GaussianNoise(draws=2)),)
TASKS = [
    maps.Task("object", network, CASES, (LatentDistance(),), num_inference_steps=2, guidance_scale=4.0)
    for network in maps.NETWORKS
]
FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def little_work():
    """Intervals of planted maps need no more resamples, and to be another estimate than one point's takes two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "_N_RESAMPLES", 30)
        patch.setattr(variants, "POINTS", (1, 2))
        yield


@pytest.mark.parametrize("task", TASKS, ids=maps.NETWORKS)
@pytest.mark.parametrize("points", [0, 1, 2])
def test_the_cost_that_is_announced_is_the_cost(small_pipe, task, points):
    """The hook counts ways forward; a way back through each row of the differentiated run counts twice."""
    variant = variants.Variant.of(task, points)
    with counting(small_pipe) as counter:
        effects = variant.run(small_pipe)
    n_evaluations = 2 * CASES[0].corruption.draws  # of a row at one step, in both halves
    n_counted = counter["rows"] + 2 * points * n_evaluations * variant.num_inference_steps
    # of the exact map by step: the ResNet and the self-attention before any text change nothing in the first step, so
    # that their rows go on as if they had not begun
    n_spared = 2 * n_evaluations if not points and task.network == "denoiser" else 0
    assert n_counted + n_spared == variant.row_evaluations(small_pipe)
    assert effects.attrs.get("integrated", 0) == points
    assert ("window" in effects.dims) == (task.network == "denoiser")


@pytest.fixture(scope="module")
def traced(small_pipe):
    """Maps as `benchmarks.reproduce.tracing` would make them of the tasks."""
    return {task.network: task.run(small_pipe) for task in TASKS}


@pytest.fixture(scope="module")
def untraced(small_pipe, tmp_path_factory):
    """What is compared without traced maps, and the folder of what was made for it."""
    folder = tmp_path_factory.mktemp("maps")
    return variants.collect(small_pipe, TASKS, "", folder, None), folder


def test_without_traced_maps_only_steps_are_compared(untraced):
    (only,), folder = untraced
    assert only.places == variants.STEPS
    assert {path.name for path in folder.glob("*/*")} == {"object.denoiser.nc"}


def test_maps_are_made_once_and_put_beside_what_was_traced(small_pipe, untraced, traced, tmp_path, monkeypatch, capsys):
    shutil.copytree(untraced[1], tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(variants, "traced", lambda pipe, task, folder: traced[task.network])
    by_step, by_site, by_token = found = variants.collect(small_pipe, TASKS, "", tmp_path, None)
    assert [one.places for one in found] == [variants.STEPS, variants.SITES, variants.TOKENS]
    assert all(list(one.estimates) == ["estimated", "integrated"] for one in found)
    assert "window" in by_step.exact.dims
    assert by_site.exact.identical(traced["denoiser"])
    assert by_token.exact.identical(traced["text"])
    assert "window" not in by_site.estimates["estimated"].dims
    difference = by_step.estimates["estimated"].restored - by_step.estimates["integrated"].restored
    assert float(abs(difference).max()) > 0
    capsys.readouterr()
    again = variants.collect(small_pipe, TASKS, "", tmp_path, None)
    assert "row-evaluations" not in capsys.readouterr().out, "all of them are there"
    for one, other in zip(found, again, strict=True):
        for way, effects in one.estimates.items():
            xarray.testing.assert_identical(effects, other.estimates[way])
    with pytest.raises(ValueError, match="was made with another model"):
        variants.collect(small_pipe, TASKS, "another", tmp_path, None)


def test_traced_maps_of_fewer_runs_are_refused(small_pipe, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "traced", lambda pipe, task, folder: traced[task.network].isel(draw=[0]))
    with pytest.raises(ValueError, match="has 1 draws, and 2 are asked for"):
        variants.collect(small_pipe, TASKS, "", tmp_path, None)
    assert not list(tmp_path.iterdir()), "before any work"


def test_a_traced_map_is_found_by_what_it_was_made_for(small_pipe, tmp_path):
    pipe = small_pipe
    options = {"n_cases": 1, "draws": 1, "num_inference_steps": 5, "guidance_scale": 4.0}
    (task, _), _ = variants.make_tasks(pipe, ["style"], **options)
    assert variants.traced(pipe, task, None) is None
    assert variants.traced(pipe, task, tmp_path) is None
    (larger, _), model = variants.make_tasks(pipe, ["style"], **options | {"n_cases": 3, "draws": 2})
    assert larger.cases[0].prompt == task.cases[0].prompt, "the first cases are the same"
    effects = make_map(numpy.zeros((3, 2, 4, 2)), metric=["clip_score", "probe_probability"])
    save_map(effects.assign_attrs(arguments=larger.arguments(model)), maps.map_path(larger, tmp_path))
    assert variants.traced(pipe, task, tmp_path).sizes["case"] == 3
    with pytest.raises(ValueError, match="was made with another model or other settings"):
        variants.traced(pipe, dataclasses.replace(task, num_inference_steps=4), tmp_path)


@pytest.fixture(scope="module")
def linear():
    """Exact and estimated maps by step of a metric that curves, and how they were made."""
    pipe = linear_pipeline()

    def curved(images, latents, cases):
        values = linear_metric(images, latents, cases)
        return values + 0.05 * values.square()

    curved.needs_images = False
    case = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("dog"), seed=3)
    options = {"metric": curved, "sites": mediation.sites(pipe, network="unet"), **FAST}
    exact = mediation.trace(pipe, case, windows="each", **options)
    estimated = mediation.trace(pipe, case, backend="attribution_patching", **options)
    return pipe, case, options, exact, estimated


def test_an_estimate_for_all_of_sampling_is_the_sum_over_steps(linear):
    pipe, case, options, _, estimated = linear
    whole = mediation.trace(pipe, case, backend="attribution_patching", windows=[(0, 1)], **options)
    found = mediation.indirect_effect(fidelity.over_steps(estimated))
    expected = mediation.indirect_effect(whole).isel(window=0)
    numpy.testing.assert_allclose(found.values, expected.values, rtol=1e-9, atol=1e-12)


def test_screening_what_was_measured_is_what_the_library_does(linear):
    pipe, case, options, exact, estimated = linear
    library = mediation.trace(pipe, case, backend="attribution_patching", screen=0.3, **options)
    found = fidelity.screened(estimated, exact, 0.3)
    numpy.testing.assert_allclose(found.restored.transpose(*library.restored.dims), library.restored, rtol=1e-9)
    assert float(abs(found.restored - estimated.restored).max()) > 1e-3, "something was measured"


def values(estimate):
    return pytest.approx(dataclasses.astuple(estimate))


def test_agreement_is_counted_as_by_hand():
    exact = {"style": with_metric(EXACT), "object": with_metric(REVERSED)}
    estimates = {attribute: {"estimated": with_metric(REVERSED)} for attribute in exact}
    found = {(one.attribute, one.variant): one for one in fidelity.fidelities("sites", exact, estimates)}
    wrong, right = (found[attribute, "estimated"] for attribute in exact)
    assert values(wrong.spearman) == (-1, -1, -1)
    assert values(wrong.recall) == (0.8, 0.8, 0.8), "the first five, against the last five"
    assert wrong.chance == pytest.approx(5 / 6)
    assert wrong.control == pytest.approx(-1), "what the other attribute's estimates have"
    assert values(wrong.total) == (1, 1, 1)
    assert values(right.spearman) == (1, 1, 1)
    assert values(right.recall) == (1, 1, 1)
    # Two places of six are measured: the last two, which turn out to be 2 and 1.
    screened = found["style", "estimated, screened"]
    assert screened.spearman.mean == pytest.approx(stats.spearmanr([1, 2, 3, 4, 2, 1], EXACT[0]).statistic)
    assert (wrong.goal, screened.goal) == (0.8, 0.9)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((0.9, 0.85, 0.95), "met"),
        ((0.9, 0.7, 0.95), "met by the estimate, open by its interval"),
        ((0.7, 0.6, 0.9), "not met"),
        ((0.9, math.nan, math.nan), "met by the estimate, open by its interval"),
        ((math.nan, math.nan, math.nan), "not met"),
    ],
)
def test_a_goal_is_met_or_not(found, expected):
    assert fidelity.reaches(Estimate(*found), 0.8) == expected


def test_where_estimates_fail():
    """Twice too large in every ResNet, of the wrong sign in feed-forwards, and far off at one place."""
    exact = with_metric([[1, 1, 2, 2, 3, 3]])
    estimates = {"estimated": with_metric([[2, -1, 4, -2, 6, -30]])}
    (resnet, feed_forward), (miss,) = fidelity.failures("sites", "style", exact, estimates, n_misses=1)
    assert (resnet.part, resnet.n, resnet.signs) == ("resnet", 3, 1)
    assert (resnet.slope, resnet.spearman) == pytest.approx((2, 1))
    assert (feed_forward.part, feed_forward.signs) == ("feed forward", 0)
    assert (feed_forward.slope, feed_forward.spearman) == pytest.approx(((-1 - 4 - 90) / 14, -1))
    assert (miss.place, miss.estimate, miss.exact) == ("unet.2.feed_forward", -30, 3)


def test_steps_are_parts_too():
    exact = make_map(
        numpy.arange(12.0).reshape(1, 1, 6, 2, 1), sites=NAMES, window=["0–0.5", "0.5–1"], metric=["m"]
    )  # fmt: skip
    parts, _ = fidelity.failures("sites", "style", exact, {"estimated": exact})
    assert [part.part for part in parts] == ["resnet", "feed forward", "window 0–0.5", "window 0.5–1"]
    assert [part.n for part in parts] == [6, 6, 6, 6]
    assert [part.spearman for part in parts] == pytest.approx([1, 1, 1, 1])
