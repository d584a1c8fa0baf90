"""What is stored is made once, and only for what it was made for."""

import pytest
import xarray

from benchmarks.reproduce.storing import stored


def test_what_is_stored_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return xarray.Dataset({"x": ("row", [1.0, 2.0]), "label": ("row", ["a", "bc"])})

    path = tmp_path / "folder" / "x.nc"
    first = stored(path, {"model": "m"}, make)
    xarray.testing.assert_identical(stored(path, {"model": "m"}, make), first)
    assert made == [1]
    assert first.label.values.tolist() == ["a", "bc"]
    with pytest.raises(ValueError, match="was made with another model or other settings"):
        stored(path, {"model": "n"}, make)


def test_what_is_interrupted_leaves_no_file(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "x.nc", {}, interrupted)
    assert not list(tmp_path.iterdir())
