"""The attribution guide does what it says: its Python and its commands run, in order, and leave what they promise."""

import pathlib
import re
import shlex

import matplotlib.pyplot
import pytest
from typer.testing import CliRunner

import editing.cli
import mediation.cli
from mediation.mapfiles import open_map

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "attribution.md"
APPS = {"mediation": mediation.cli.app, "editing": editing.cli.app}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, source in enumerate(blocks("python")):
        exec(compile(source, f"{GUIDE.name}, block {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    assert names["steps"].sizes["window"] == names["sampling"]["num_inference_steps"]
    assert names["steps"].attrs["estimate"] == "first_order"
    assert (names["checked"].attrs["integrated"], names["checked"].attrs["verify"]) == (2, 5)
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
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert {tuple(command[:2]) for command in commands} >= {("mediation", "attribute"), ("editing", "amplify")}
    for program, *arguments in commands:
        result = CliRunner().invoke(APPS[program], arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    assert "sampled" in open_map("ink.nc")
    assert (tmp_path / "ink-scores.png").exists()
    erased, amplified = (editing.load(f"{name}-ink.safetensors") for name in ("no", "more"))
    assert (erased.metadata["method"], amplified.metadata["method"]) == ("cad_erase", "cad_amplify")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", GUIDE.read_text()))
def test_links_lead_somewhere(link):
    assert (GUIDE.parent / link).exists()
