"""The autoencoder guide does what it says: its Python and its commands run, in order."""

import pathlib
import re
import shlex

import matplotlib.pyplot
import pytest
import xarray
from typer.testing import CliRunner

import editing.cli
import mediation.cli
from mediation import open_dictionary

GUIDE = pathlib.Path(__file__).parents[3] / "docs" / "autoencoders.md"
PROGRAMS = {"mediation": mediation.cli.app, "editing": editing.cli.app}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, source in enumerate(blocks("python")):
        exec(compile(source, f"{GUIDE.name}, block {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    assert names["effects"].sizes["latent"] == 6
    assert names["image"].size == (64, 64)
    assert names["predicted"].layout.shape == (1, 64, 64)
    assert names["layout"].sizes == {"autoencoder": 1, "case": 4}
    assert (tmp_path / "latents.html").exists()
    xarray.testing.assert_equal(open_dictionary("latents.nc"), names["dictionary"])
    assert (tmp_path / "my-sae" / "model.safetensors").stat().st_size > 2 * 256 * 128 * 4


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks("sh")).splitlines():
        program, *arguments = shlex.split(line)
        result = CliRunner().invoke(PROGRAMS[program], arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    assert open_dictionary("cat.nc").sizes["latent"] == 64
    assert (tmp_path / "steered.png").exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", GUIDE.read_text()))
def test_links_lead_somewhere(link):
    assert (GUIDE.parent / link).exists()
