"""The editing guide does what it says: its Python and its commands run, in order, and leave what they promise."""

import pytest
import torch

from tests.guides import few_trials, run_commands, run_python

GUIDE = "docs/editing.md"
pytestmark = pytest.mark.no_cover  # what guides show has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    """As written, but that pictures take one step, and a prompt of each role is judged."""
    monkeypatch.chdir(tmp_path)
    few_trials(monkeypatch)
    steps = {f"num_inference_steps={n}": "num_inference_steps=1" for n in (8, 4)}
    names = run_python(GUIDE, steps)
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
    few_trials(monkeypatch)
    commands = run_commands(GUIDE, {"--steps 2": "--steps 1"})
    assert {command[1] for command in commands} >= {"quickfix", "show", "evaluate", "export", "apply"}
    assert (tmp_path / "report" / "sheet.png").exists()
    assert (tmp_path / "edited-by-command" / "model_index.json").exists()
