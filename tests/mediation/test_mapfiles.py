"""A map that was written is the map that is read, images and all."""

import importlib.util

import numpy
import pytest
import xarray

from mediation.mapfiles import check_path, open_map, save_map
from mediation.schema import seed_labels
from tests.maps import SITES, make_map

IMAGES = numpy.arange(24, dtype=numpy.uint8).reshape(1, 1, 2, 4, 3) + 200  # up to 223: more than a signed byte holds
DIMS = ("case", "draw", "y", "x", "channel")
MAP = make_map([[[0.5, numpy.nan]]], prompts=["un café"])
PICTURED = MAP.assign(
    clean_image=(DIMS, IMAGES),
    corrupted_image=(DIMS, IMAGES),
    restored_image=(("case", "draw", "image_site", "y", "x", "channel"), IMAGES[:, :, None]),
).assign_coords(image_site=[SITES[1]])


@pytest.mark.parametrize("name", ["map.nc", "map.zarr"])
def test_round_trip(name, tmp_path):
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    save_map(PICTURED, tmp_path / name)
    for _ in range(2):  # what was read can be written again, over what is there
        found = open_map(tmp_path / name)
        xarray.testing.assert_equal(found, PICTURED)
        assert found.attrs == PICTURED.attrs
        assert found.restored_image.dtype == numpy.uint8
        save_map(found, tmp_path / name)


@pytest.mark.parametrize("name", ["map.nc", "map.zarr"])
@pytest.mark.parametrize("seeds", [[3, 2**31 - 1], [0, 2**31], [2**53 + 1, 2**63 - 1], [7, 2**64 - 2]])
def test_seeds_of_any_size_are_kept(name, seeds, tmp_path):
    if name.endswith("zarr"):
        pytest.importorskip("zarr")
    effects = make_map([[[0.5]], [[1.0]]], prompts=["a cat", "a dog"])
    effects = effects.assign_coords(seed=("case", seed_labels(seeds)))
    for _ in range(2):
        save_map(effects, tmp_path / name)
        effects = open_map(tmp_path / name)
        assert effects.seed.values.tolist() == seeds


def test_a_folder_that_is_not_there_is_no_place_for_a_map(tmp_path):
    for name in ("map.nc", "map.zarr"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to keep map\..* in: make it first"):
            check_path(tmp_path / "nowhere" / name)
        assert check_path(tmp_path / name) == tmp_path / name
    with pytest.raises(FileNotFoundError, match="there is no map"):
        open_map(tmp_path / "nowhere" / "map.nc")


def test_files_that_hold_no_map_are_refused(tmp_path):
    xarray.Dataset({"clean": ("case", [1.0])}).to_netcdf(tmp_path / "map.nc", engine="scipy")
    with pytest.raises(ValueError, match="has no corrupted, sham, restored"):
        open_map(tmp_path / "map.nc")
    with pytest.raises(FileNotFoundError, match="there is no map"):
        open_map(tmp_path / "other.nc")
    with pytest.raises(ValueError, match=r"\.nc file or a \.zarr folder, got 'map\.csv'"):
        save_map(MAP, tmp_path / "map.csv")
    with pytest.raises(ValueError, match="has no clean"):
        save_map(xarray.Dataset(), tmp_path / "map.nc")


def test_zarr_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .*\[zarr\]"):
        save_map(MAP, tmp_path / "map.zarr")
