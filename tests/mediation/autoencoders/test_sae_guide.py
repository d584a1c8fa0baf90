"""The autoencoder guide does what it says: its Python and its commands run, in order."""

import pytest
import xarray

from mediation import open_dictionary
from tests.guides import run_commands, run_python

GUIDE = "docs/autoencoders.md"
pytestmark = pytest.mark.no_cover  # what guides show has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python(GUIDE)
    assert names["effects"].sizes["latent"] == 6
    assert names["image"].size == (64, 64)
    assert names["without"].size == (64, 64)
    assert names["vectors"].notnull().all("component").sum() == len(names["labels"]) > 0
    assert names["predicted"].layout.shape == (1, 64, 64)
    assert names["layout"].sizes == {"autoencoder": 1, "case": 4}
    assert (tmp_path / "latents.html").exists()
    xarray.testing.assert_equal(open_dictionary("latents.nc"), names["dictionary"])
    assert (tmp_path / "my-sae" / "model.safetensors").stat().st_size > 2 * 256 * 128 * 4


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_commands(GUIDE)
    assert open_dictionary("cat.nc").sizes["latent"] == 64
    assert (tmp_path / "steered.png").exists()
