"""A row that is not finite is named, and no average is taken over it or around it."""

import warnings

import numpy
import pytest

import mediation
from mediation.badrows import bad_rows, warn_of_bad_rows, without_bad_rows
from mediation.effects import noise_floor
from mediation.mapfiles import open_map, save_map
from tests.maps import SITES, make_map
from tests.runs import CASE

FAST = {"n_resamples": 2}
REMAINING = numpy.array([[[9.0, 2.0, 1.0]], [[9.0, 3.0, 1.0]], [[9.0, 4.0, 1.0]]])  # the first site is the best


def with_bad(value, *index, values=REMAINING, **labels):
    """A map with one restored value that is not finite, which its metric gave: its sham is there."""
    effects = make_map(values.copy(), **labels)
    effects["restored"][index] = value
    return effects


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
def test_a_site_cannot_rank_first_on_the_cases_that_are_left(value):
    effects = with_bad(value, 1, 0, 0)
    with pytest.warns(UserWarning, match=r"not finite for rows of unet\.down\.0\.0\.resnet \(case 1\): averages leave"):
        assert mediation.top_sites(effects, k=3) == [SITES[1], SITES[2]]
    with pytest.warns(UserWarning, match="case 1"):
        summary = mediation.summarize(effects, **FAST)
    numpy.testing.assert_array_equal(summary["mean"], [numpy.nan, 3, 1])
    assert summary.n.values.tolist() == [0, 3, 3]
    assert float(summary.total) == 1
    with pytest.warns(UserWarning, match="case 1"):
        grouped = mediation.summarize(effects, by="component", **FAST)
    assert grouped["mean"].to_series().to_dict() == {"cross_attention": 3, "resnet": 1}
    with pytest.warns(UserWarning, match="case 1"):
        shares = mediation.indirect_effect(effects, normalize=True)
    numpy.testing.assert_array_equal(shares.mean("draw").mean("case"), [numpy.nan, 3, 1])


def test_comparisons_leave_the_place_out():
    effects = with_bad(numpy.inf, 1, 0, 0)
    with pytest.warns(UserWarning, match="case 1"):
        agreement = mediation.compare(effects, make_map(REMAINING.copy()), k=1, **FAST)
    assert agreement.attrs["n_places"] == 2
    with pytest.warns(UserWarning, match="case 1"):
        differences = mediation.contrast(effects, SITES[2], **FAST)
    numpy.testing.assert_array_equal(differences.difference, [numpy.nan, 2])
    assert differences.n.values.tolist() == [0, 3]


def test_rows_are_named_by_all_that_tells_them_apart():
    values = numpy.ones((3, 1, 2, 2))
    effects = with_bad(numpy.nan, 2, 0, 1, 0, values=values, window=["0–0.5", "0.5–1"])
    with pytest.warns(UserWarning, match=r"unet\.down\.0\.0\.cross_attention \(case 2, window 0–0\.5\):"):
        kept = without_bad_rows(effects)
    numpy.testing.assert_array_equal(numpy.isnan(kept.restored).all(("case", "draw")), [[False, False], [True, False]])
    metrics = with_bad(numpy.nan, 0, 0, 0, 1, values=values, metric=["clip_score", "lpips"])
    with pytest.warns(UserWarning, match=r"unet\.down\.0\.0\.resnet \(case 0, metric lpips\):"):
        kept = without_bad_rows(metrics)
    assert kept.restored.sel(metric="clip_score").notnull().all()


def test_many_rows_are_counted():
    effects = make_map(REMAINING.copy())
    effects["restored"][:] = numpy.inf
    with pytest.warns(UserWarning, match=r"case 0\).* and 4 more: averages"):
        warn_of_bad_rows(effects)


@pytest.mark.parametrize("name", ["clean", "corrupted"])
def test_without_a_control_there_is_nothing_to_average_until_the_case_is_dropped(name):
    effects = make_map(REMAINING.copy())
    effects[name][2, 0] = numpy.inf
    if name == "corrupted":
        effects["sham"][2] = numpy.nan  # it is the same run
    assert bad_rows(effects).values[:, 0].tolist() == [[False] * 3, [False] * 3, [True] * 3]
    with pytest.warns(UserWarning, match=r"for the clean or the corrupted run of case 2: .*drop_sel"):
        summary = mediation.summarize(effects, **FAST)
    assert numpy.isnan(summary["mean"]).all()
    assert numpy.isnan(summary.total)
    with pytest.warns(UserWarning, match="case 2"):
        assert mediation.top_sites(effects) == []
    dropped = effects.drop_sel(case=[2])
    assert mediation.summarize(dropped, **FAST)["mean"].values.tolist() == [9, 2.5, 1]


@pytest.mark.parametrize("tokens", [None, ["subject", "before"]])
def test_a_whole_chunk_that_is_not_finite_is_not_what_never_ran(tiny_pipe, tokens, tmp_path):
    """The sham of the chunk is not finite either; the second prompt has no token before its subject."""
    calls = []

    def metric(images, latents, cases):
        calls.append(len(latents))
        values = latents.double().mean((1, 2, 3))
        return values * numpy.nan if len(calls) == 1 else values

    cases = [mediation.Case("a cat", subject="cat"), mediation.Case("cat", subject="cat")]
    sites = ["text_encoder.0.mlp", "text_encoder.1.mlp", "text_encoder.2.mlp"]
    with pytest.warns(UserWarning, match=r"not finite for rows of text_encoder\.0\.mlp \(case 0"):
        effects = mediation.trace(
            tiny_pipe, cases, sites=sites, tokens=tokens, metric=metric, batch_size=4, num_inference_steps=1,
            guidance_scale=1.0, progress=False,
        )  # fmt: skip
    save_map(effects, tmp_path / "map.nc")
    effects = open_map(tmp_path / "map.nc")
    bad = numpy.isnan(effects.restored.isel(case=0, draw=0)).values
    assert bad.any()
    assert bad_rows(effects).any("case").isel(draw=0).values.tolist() == bad.tolist()
    with pytest.warns(UserWarning, match="case 0"):
        summary = mediation.summarize(effects, **FAST)
    assert numpy.isnan(summary["mean"].values[bad]).all()
    if tokens:
        rest = summary.n.where(~bad)
        assert rest.sel(token="subject").dropna("site").values.tolist() == [2, 2]
        assert rest.sel(token="before").dropna("site").values.tolist() == [1, 1]
        assert not bad_rows(effects.sel(token="before")).isel(case=1).any()


def test_maps_that_do_not_say_what_ran_leave_the_sham_out():
    values = numpy.ones((2, 1, 1, 2))
    values[1, ..., 1] = numpy.nan
    effects = make_map(values, token=["subject", "before"])
    assert not bad_rows(effects.drop_vars("absent")).any()
    assert not bad_rows(effects.drop_vars("absent").sel(token="before")).any()
    assert bad_rows(effects.drop_vars("absent").isel(token=1, drop=True)).values.ravel().tolist() == [False, True]


def test_what_never_ran_is_no_bad_row():
    values = REMAINING.copy()
    values[0, :, 0] = numpy.nan  # the sham is NaN too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = mediation.summarize(make_map(values), **FAST)
    assert summary["mean"].values.tolist() == [9, 3, 1]
    assert summary.n.values.tolist() == [2, 3, 3]


def test_a_map_without_bad_rows_is_left_as_it_is():
    effects = make_map(REMAINING.copy())
    kept = without_bad_rows(effects)
    assert kept.identical(effects)
    assert float(noise_floor(kept)) == 0


def test_a_trace_warns_of_rows_at_once(tiny_pipe):
    def metric(images, latents, cases):
        values = latents.double().mean((1, 2, 3))
        values[2] = float("inf")  # the first row behind the controls
        return values

    with pytest.warns(UserWarning, match=r"rows of unet\.mid\.0\.resnet \(case 0, window 0–0\.5\)"):
        mediation.trace(
            tiny_pipe, CASE, sites=["unet.mid.0.resnet"], windows=[(0, 0.5), (0.5, 1)], metric=metric,
            num_inference_steps=2, guidance_scale=1.0, progress=False,
        )  # fmt: skip
