"""The autoencoder guide does what it says: its Python and its commands run, in order."""

import pytest
import xarray

from mediation import open_dictionary
from tests.guides import run_commands, run_python

GUIDE = "docs/autoencoders.md"
pytestmark = pytest.mark.no_cover  # what guides show has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    """As written, but that pictures take two steps, one of them late, and fewer of them are stored."""
    monkeypatch.chdir(tmp_path)
    smaller = {'"num_inference_steps": 4': '"num_inference_steps": 2'}
    smaller |= {"n_positions=1024, batch_size=256": "n_positions=256, batch_size=256", "n_images=8": "n_images=4"}
    names = run_python(GUIDE, smaller)
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
    run_commands(GUIDE, {"--positions 256 --steps 2": "--positions 256 --steps 1"})
    assert open_dictionary("cat.nc").sizes["latent"] == 64
    assert (tmp_path / "steered.png").exists()
