"""The attribution guide does what it says: its Python and its commands run, in order, and leave what they promise."""

import pytest

import editing
from mediation.mapfiles import open_map
from tests.guides import few_trials, run_commands, run_python

GUIDE = "docs/attribution.md"
pytestmark = pytest.mark.no_cover  # what guides show has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    """As written, but that less is searched, checked and judged, and in fewer steps where none are asked about."""
    monkeypatch.chdir(tmp_path)
    few_trials(monkeypatch)
    smaller = {
        'tokens="each", **sampling': 'tokens="each", **sampling | {"num_inference_steps": 1}',
        "verify=5, **options": 'verify=3, **options | {"num_inference_steps": 1}',
        "share=0.5, **sampling": 'share=0.01, **sampling | {"num_inference_steps": 1}',
        "sites=chosen, **sampling": 'sites=chosen, **sampling | {"num_inference_steps": 1}',
        "edits, suite, **sampling": 'edits, suite, **sampling | {"num_inference_steps": 1}',
    }
    scored = ('pipe, "ink style"', "parameters=others", 'objective="amplify"', "images=[image]")
    smaller |= {f"{last}, num_inference_steps=2": f"{last}, num_inference_steps=1" for last in scored}
    names = run_python(GUIDE, smaller)
    assert names["steps"].sizes["window"] == names["sampling"]["num_inference_steps"]
    assert names["steps"].attrs["estimate"] == "first_order"
    assert (names["checked"].attrs["integrated"], names["checked"].attrs["verify"]) == (2, 3)
    share = names["screened"].exact.notnull().isel(case=0, draw=0).mean()
    assert 0.2 <= float(share) < 0.25, "a fifth of all places, rounded up"
    n_weights = names["erased"].report["n_weights"]
    assert names["erased"].report["n_changed"] <= 0.006 * n_weights
    assert names["fewer"].report["n_changed"] <= 0.001 * n_weights < names["erased"].report["n_changed"]
    assert {site.network for site in names["elsewhere"].sites.values()} == {"unet", "text_encoder"}
    assert names["of_pictures"].metadata["n_images"] == 1
    assert names["both"].metadata["method"] == "sum"
    assert names["report"].model.values.tolist() == ["unedited", "cad", "random"]
    assert names["where"].site.values.tolist() == names["effects"].site.values.tolist()


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = run_commands(GUIDE, {"--verify 5 --steps 2": "--verify 2 --steps 1"})
    assert {tuple(command[:2]) for command in commands} >= {("mediation", "attribute"), ("editing", "amplify")}
    assert "sampled" in open_map("ink.nc")
    assert (tmp_path / "ink-scores.png").exists()
    erased, amplified = (editing.load(f"{name}-ink.safetensors") for name in ("no", "more"))
    assert (erased.metadata["method"], amplified.metadata["method"]) == ("cad_erase", "cad_amplify")
