"""What is no map is told what it lacks; what is one survives being written to a file."""

import numpy
import pytest
import xarray

import mediation
from mediation.schema import check
from mediation.tracing import label
from tests.maps import make_map

MAP = make_map([[[[0.5, 1.0], [0.25, 0.0]]]], token=["subject", "eos"], prompts=["a cat"])


def test_a_map_passes():
    check(MAP)
    check(MAP.transpose(..., "case"))
    check(MAP.sel(token="eos").drop_vars("token"), needs=("component", "layer"))
    check(make_map([[[[0.5, 1.0]]]], metric=["a", "b"]))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (MAP.drop_vars(["sham", "clean"]), "it has no clean, sham"),
        (MAP.isel(case=0), r"clean has dims \(draw\), not \(case, draw\); corrupted has dims"),
        (
            MAP.assign(sham=MAP.sham.isel(token=0, drop=True)),
            r"sham has dims \(case, draw, site\), not .*token",
        ),
        (MAP.rename(token="word"), r"restored has dims \(case, draw, site, word\)"),
        (MAP.drop_vars("site"), "the dimension 'site' has no labels"),
        (MAP.drop_vars("token"), "the dimension 'token' has no labels"),
        (MAP.assign_coords(site=[0, 1]), "the labels of 'site' are int64, not names"),
        (MAP.isel(site=[0, 0]), r"labels of 'site' repeat: unet\.down\.0\.0\.resnet"),
        (MAP.assign(clean=MAP.clean.astype(str)), "clean holds <U32, not real numbers"),
        (MAP.assign(restored=MAP.restored > 0), "restored holds bool, not real numbers"),
    ],
)
def test_what_is_wrong_is_named(broken, message):
    with pytest.raises(ValueError, match=f"expected the Dataset that mediation.trace returns, but .*{message}"):
        check(broken)


def test_what_is_no_dataset_is_named():
    with pytest.raises(TypeError, match="got DataArray"):
        mediation.summarize(MAP.restored)


def test_everything_that_is_wrong_is_said_at_once():
    broken = MAP.drop_vars(["site", "token"]).assign(clean=MAP.clean.astype(complex))
    with pytest.raises(ValueError, match=r"clean holds complex128.*'site' has no labels.*'token' has no labels"):
        check(broken)


def test_coordinates_that_a_question_needs_are_asked_for():
    with pytest.raises(ValueError, match="its sites have no coordinate 'block'"):
        mediation.summarize(MAP, by="block")


def same(a, b):
    xarray.testing.assert_equal(a, b)
    assert set(a.coords) == set(b.coords)
    assert a.attrs == b.attrs
    check(b)
    xarray.testing.assert_equal(mediation.summarize(a), mediation.summarize(b))


WINDOWS = make_map([[[[0.5], [1.0]]]], window=["0–0.5"]).assign_coords(window_start=("window", [0.0]))


@pytest.mark.parametrize("effects", [MAP, WINDOWS, MAP.assign_coords(token=[0, 1])], ids=["tokens", "windows", "each"])
def test_netcdf_round_trip(effects, tmp_path):
    effects.to_netcdf(tmp_path / "map.nc", engine="scipy")
    with xarray.open_dataset(tmp_path / "map.nc", engine="scipy") as found:
        same(effects, found.load())


@pytest.mark.parametrize("effects", [MAP, WINDOWS], ids=["tokens", "windows"])
def test_zarr_round_trip(effects, tmp_path):
    pytest.importorskip("zarr")
    effects.to_zarr(tmp_path / "map.zarr", zarr_format=2)
    with xarray.open_zarr(tmp_path / "map.zarr") as found:
        same(effects, found.load())


def test_names_and_positions_of_tokens_become_names(tiny_pipe):
    from mediation.plans import make_plan
    from mediation.sampling import Sampling

    options = {
        "windows": None,
        "mode": "restore",
        "batch_size": None,
        "images": None,
        "progress": False,
    }
    plan = make_plan(
        tiny_pipe,
        mediation.Case("a cat", subject="cat"),
        sites=["text_encoder.0.mlp"],
        metric=mediation.LatentDistance(),
        tokens=["subject", 3],
        sampling=Sampling(),
        **options,
    )
    whole, each = numpy.zeros((1, 1, 1)), numpy.zeros((1, 1, *plan.shape, 1))
    effects = label(plan, {"clean": whole, "corrupted": whole, "sham": each, "restored": each})
    assert effects.token.values.tolist() == ["subject", "3"]
    assert effects.token.dtype.kind == "U"
