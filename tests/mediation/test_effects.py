"""Effects on maps small enough to work out by hand."""

import numpy
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from scipy import stats

import mediation
from mediation import intervals
from mediation.effects import noise_floor
from mediation.intervals import nanmean


def make(clean, corrupted, restored, sham=None, sites=("unet.down.0.0.resnet", "unet.mid.0.resnet")):
    """A map of (case, draw) controls and (case, draw, site) restorations."""
    corrupted, restored = numpy.asarray(corrupted, float), numpy.asarray(restored, float)
    sham = numpy.broadcast_to(corrupted[..., None], restored.shape) if sham is None else sham
    return xarray.Dataset(
        {
            "clean": (("case", "draw"), numpy.asarray(clean, float)),
            "corrupted": (("case", "draw"), corrupted),
            "sham": (("case", "draw", "site"), numpy.asarray(sham, float)),
            "restored": (("case", "draw", "site"), restored),
        },
        coords={"site": list(sites)[: restored.shape[2]]},
    )


THREE = make(
    clean=[[10], [6], [2]],
    corrupted=[[2], [2], [2]],
    restored=[[[6, 2]], [[3, 2]], [[5, 1]]],
)


def test_effects_are_signed_differences():
    assert mediation.total_effect(THREE).values.ravel().tolist() == [8, 4, 0]
    assert mediation.indirect_effect(THREE).values.squeeze().tolist() == [[4, 0], [1, 0], [3, -1]]


def test_necessity_is_what_is_lost_without_the_site():
    """In a knock-out map, sites are changed in the clean run, whose sham it carries."""
    effects = make([[10]], [[2]], [[[9, 2]]], sham=[[[10.5, 10]]]).assign_attrs(intervention="knock_out")
    assert mediation.total_effect(effects).values.tolist() == [[8]]
    assert mediation.indirect_effect(effects).values.tolist() == [[[1, 8]]]
    assert mediation.indirect_effect(effects, normalize=True).values.tolist() == [[[1 / 8, 1]]]
    assert float(noise_floor(effects)) == 0.5
    summary = mediation.summarize(effects)
    assert (summary["mean"].values.tolist(), summary.attrs["intervention"]) == ([1, 8], "knock_out")
    assert mediation.top_sites(effects, k=1) == ["unet.mid.0.resnet"]


def test_the_ratio_is_of_means_and_cases_without_effect_are_masked_and_counted():
    normalized = mediation.indirect_effect(THREE, normalize=True)
    assert normalized.attrs["n_masked"] == 1
    # (4 + 1) / (8 + 4): the third case has no total effect.
    numpy.testing.assert_allclose(normalized.mean(("case", "draw")), [5 / 12, 0])
    numpy.testing.assert_allclose(mediation.summarize(THREE, normalize=True)["mean"], [5 / 12, 0])
    assert mediation.summarize(THREE, normalize=True).n.values.tolist() == [2, 2]


def test_normalized_effects_are_those_of_the_summary():
    """Whatever is missing: a token of some cases, the total effect of one draw of a case, and of all of another."""
    rng = numpy.random.default_rng(4)
    dims = ("case", "draw", "site", "token", "metric")
    restored = rng.normal(size=(6, 2, 2, 2, 2))
    restored[:4, :, :, 1] = numpy.nan
    clean = rng.uniform(1, 3, (6, 2, 2))
    clean[1, 0, 0] = clean[5, :, 1] = 0.05
    effects = xarray.Dataset(
        {
            "clean": (("case", "draw", "metric"), clean),
            "corrupted": (("case", "draw", "metric"), numpy.zeros((6, 2, 2))),
            "sham": (dims, numpy.where(numpy.isnan(restored), numpy.nan, 0.1)),
            "restored": (dims, restored),
        },
        coords={"site": ["a", "b"], "token": ["subject", "after"], "metric": ["m", "n"]},
    )
    normalized = mediation.indirect_effect(effects, normalize=True)
    summary = mediation.summarize(effects, normalize=True, n_resamples=2)
    xarray.testing.assert_allclose(normalized.mean("draw").mean("case"), summary["mean"].rename("indirect_effect"))
    assert normalized.attrs["n_masked"] == [1, 2]
    after = {"site": "a", "token": "after", "metric": "m"}  # of cases 4 and 5 alone
    expected = restored[4:, :, 0, 1, 0].mean() / clean[4:, :, 0].mean()
    assert float(normalized.sel(after).mean("draw").mean("case")) == pytest.approx(expected)


def test_the_noise_floor_is_the_largest_sham_effect():
    effects = make([[1]], [[0]], [[[1, 1]]], sham=[[[0.25, -0.5]]])
    assert float(noise_floor(effects)) == 0.5
    assert mediation.indirect_effect(effects, normalize=True).attrs["n_masked"] == 0


def test_the_interval_is_scipys_bootstrap_over_cases_of_draw_means():
    rng = numpy.random.default_rng(0)
    restored = rng.normal(1, 2, (12, 3, 1))
    effects = make(numpy.ones((12, 3)), numpy.zeros((12, 3)), restored)
    summary = mediation.summarize(effects, confidence=0.9, n_resamples=500, seed=7)
    expected = stats.bootstrap(
        (restored.mean(1)[:, 0],), numpy.mean, confidence_level=0.9, n_resamples=500, method="percentile",
        rng=numpy.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert float(summary["mean"][0]) == pytest.approx(restored.mean())
    # Another route draws other resamples: intervals agree to the bootstrap's own error.
    assert summary.low.item() == pytest.approx(expected.low, abs=0.15)
    assert summary.high.item() == pytest.approx(expected.high, abs=0.15)
    assert summary.n.values.tolist() == [12]


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_the_interval_takes_bounded_memory_and_is_the_same(monkeypatch, method):
    restored = numpy.random.default_rng(0).normal(size=(5, 1, 100))
    effects = make(numpy.ones((5, 1)), numpy.zeros((5, 1)), restored, sites=[f"unet.{i}.resnet" for i in range(100)])
    options = {"n_resamples": 200, "method": method, "normalize": True}
    whole = mediation.summarize(effects, **options)
    sizes = []

    def measured(sample, axis):
        sizes.append(sample.size)
        return nanmean(sample, axis)

    monkeypatch.setattr(intervals, "_BATCH", 20_000)
    monkeypatch.setattr(intervals, "nanmean", measured)
    xarray.testing.assert_identical(mediation.summarize(effects, **options), whole)
    assert 10_000 < max(sizes) <= 20_000


def test_a_single_case_has_no_interval():
    summary = mediation.summarize(THREE.isel(case=[0]))
    assert numpy.isnan(summary.low).all()
    assert summary["mean"].values.tolist() == [4, 0]


def test_sites_can_be_grouped_by_a_coordinate():
    effects = THREE.assign_coords(block=("site", ["down.0", "mid"]), component=("site", ["resnet", "resnet"]))
    by_component = mediation.summarize(effects, by="component")
    assert by_component["mean"].values.tolist() == pytest.approx([(8 / 3 - 1 / 3) / 2])
    assert mediation.summarize(effects, by="block").block.values.tolist() == ["down.0", "mid"]
    with pytest.raises(ValueError, match="by must be"):
        mediation.summarize(effects, by="weather")


@pytest.mark.parametrize("by", ["component", "block", "layer"])
def test_groups_do_not_mix_networks(by):
    sites = ["text_encoder.0.self_attention", "unet.mid.0.self_attention", "unet.up.0.0.self_attention"]
    effects = make([[10]], [[2]], [[[3, 4, 8]]], sites=sites).assign_coords(
        network=("site", ["text_encoder", "unet", "unet"]),
        component=("site", ["self_attention"] * 3),
        block=("site", ["0", "mid", "up.0"]),
        layer=("site", [0, 2, 10]),
    )
    expected = {
        "component": {"text_encoder self_attention": 1, "unet self_attention": 4},
        "block": {"text_encoder 0": 1, "unet mid": 2, "unet up.0": 6},
        "layer": {"text_encoder 0": 1, "unet 2": 2, "unet 10": 6},
    }
    found = mediation.summarize(effects, by=by)["mean"].to_series().to_dict()
    assert list(found.items()) == list(expected[by].items())  # in order: layer 2 before layer 10
    assert mediation.summarize(effects, by="network")["mean"].to_series().to_dict() == {"text_encoder": 1, "unet": 4}
    alone = mediation.summarize(effects.isel(site=[1, 2]), by=by)
    assert alone[by].values.tolist() == sorted(set(effects[by].values[1:].tolist()))


@given(
    restored=numpy_st.arrays(float, (3, 2, 4), elements=st.floats(-5, 5)),
    order=st.permutations(range(4)),
)
def test_top_sites_are_sorted_and_do_not_depend_on_the_order_of_sites(restored, order):
    effects = make(numpy.ones((3, 2)), numpy.zeros((3, 2)), restored, sites=["a", "b", "c", "d"])
    top = mediation.top_sites(effects, k=4)
    means = dict(zip(effects.site.values, restored.mean((0, 1)), strict=True))
    assert [means[name] for name in top] == sorted(means.values(), reverse=True)
    shuffled = mediation.top_sites(effects.isel(site=list(order)), k=4)
    assert [means[name] for name in shuffled] == [means[name] for name in top]


def test_top_sites_take_the_best_token_and_skip_what_never_ran():
    effects = make([[1]], [[0]], [[[1, 2]]])
    by_token = xarray.DataArray([[[[0.0, 5.0], [2.0, numpy.nan]]]], dims=("case", "draw", "site", "token"))
    effects = effects.assign(restored=by_token, sham=0 * by_token).assign_coords(token=["subject", "eos"])
    assert mediation.top_sites(effects, k=2) == ["unet.down.0.0.resnet", "unet.mid.0.resnet"]
    for name in ("restored", "sham"):
        effects[name] = effects[name].where(effects.site != "unet.mid.0.resnet")
    assert mediation.top_sites(effects, k=2) == ["unet.down.0.0.resnet"]


def test_what_is_no_map_is_refused():
    for function in (mediation.total_effect, mediation.indirect_effect, mediation.summarize):
        with pytest.raises(ValueError, match="has no clean, corrupted, sham, restored"):
            function(xarray.Dataset())
    with pytest.raises(ValueError, match="at least 1"):
        mediation.top_sites(THREE, k=0)
    with pytest.raises(ValueError, match="choose one metric"):
        mediation.top_sites(THREE.expand_dims(metric=["a", "b"]))
    with pytest.raises(ValueError, match="confidence"):
        mediation.summarize(THREE, confidence=95)
