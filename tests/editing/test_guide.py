"""The editing guide does what it says: its Python and its commands run, in order, and leave what they promise."""

import pathlib
import re
import shlex

import matplotlib.pyplot
import pytest
import torch
from typer.testing import CliRunner

from editing.cli import app

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "editing.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, source in enumerate(blocks("python")):
        exec(compile(source, f"{GUIDE.name}, block {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    edit, back = names["edit"], names["same"]
    assert all(torch.equal(update.dense(), back.updates[name].dense()) for name, update in edit.updates.items())
    for name in edit.updates:
        network, _, path = name.partition(".")
        plain, edited = (getattr(names[pipe], network).get_parameter(path) for pipe in ("pipe", "edited"))
        assert not torch.equal(plain, edited), "the folder has the edit in its weights, and the pipeline has not"
    assert "noto" in names["edits"]["preserving"].metadata["preserve"]
    assert names["report"].model.values.tolist() == ["unedited", "plain", "preserving"]
    assert names["image"].size == (64, 64)


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert {command[1] for command in commands} >= {"quickfix", "show", "evaluate", "export", "apply"}
    for program, *arguments in commands:
        assert program == "editing"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
    assert (tmp_path / "report" / "sheet.png").exists()
    assert (tmp_path / "edited-by-command" / "model_index.json").exists()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", GUIDE.read_text()))
def test_links_lead_somewhere(link):
    assert (GUIDE.parent / link).exists()
