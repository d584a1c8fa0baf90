"""`mediation sae`: the examples in its help run, in their order, and do what the functions do."""

import json
import pathlib
import re
import shlex
import sys

import numpy
import pytest
import torch
from typer.testing import CliRunner

import mediation
from mediation import bundled
from mediation.autoencoders.files import open_dictionary
from mediation.autoencoders.sources import Streamed
from mediation.cli import app


@pytest.fixture
def run(monkeypatch, tiny_pipe, tmp_path):
    monkeypatch.setattr(mediation, "load_pipeline", lambda name=None: tiny_pipe)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def example(run, command):
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("sae", command, "--help").output).split())
    found = re.search(rf"Example: mediation (sae {command} .*?) (?:Arguments|Options|\*)", text)
    return shlex.split(found.group(1))


def test_every_example_runs(run, tiny_pipe):
    result = run(*example(run, "train"))
    assert result.exit_code == 0, result.output
    assert "positions: explains" in result.output
    sae = mediation.SparseAutoencoder.from_pretrained("cat-sae")
    recipe = mediation.Recipe(n_positions=256)
    options = {"site": "unet.up.1.0", "n_latents": 64, "k": 4, "recipe": recipe, "num_inference_steps": 2}
    expected = mediation.train_sae(tiny_pipe, ["a cat"], progress=False, **options)
    assert torch.equal(sae.decoder, expected.decoder)
    shown = run(*example(run, "show"))
    assert shown.output == result.output
    assert json.loads(run("sae", "show", "cat-sae", "--json").output) == sae.config


def test_training_that_was_interrupted_goes_on(run, monkeypatch):
    arguments = ["--site", "unet.down.0.0", "--prompt", "a cat", "--latents", 16, "-k", 2, "--positions", 384]
    arguments += ["--buffer", 128, "--steps", 2, "--seed", 3]
    assert run("sae", "train", "whole", *arguments).exit_code == 0
    drawn, window = [], Streamed.window

    def interrupted(self, number):
        drawn.append(number)
        if drawn == [0, 1, 2]:
            raise RuntimeError("a plug was pulled")
        return window(self, number)

    monkeypatch.setattr(Streamed, "window", interrupted)
    assert "a plug was pulled" in run("sae", "train", "part", *arguments).output
    assert [path.name for path in pathlib.Path("part").iterdir()] == ["training.safetensors"]
    result = run("sae", "train", "part", *arguments)
    assert result.exit_code == 0, result.output
    assert drawn == [0, 1, 2, 2], "what was trained on is not drawn again"
    assert not pathlib.Path("part", "training.safetensors").exists()
    whole, part = map(mediation.SparseAutoencoder.from_pretrained, ("whole", "part"))
    assert part.config == whole.config
    assert part.fingerprint == whole.fingerprint


def test_a_dictionary_is_written_with_its_sheet(run, monkeypatch):
    def sides(image):
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[:, : image.shape[2] // 2] = True
        return {"left": mask, "right": ~mask}

    monkeypatch.setattr(bundled, "label_emoji", sides)
    run(*example(run, "train"))
    result = run(*example(run, "dictionary"))
    assert result.exit_code == 0, result.output
    found = open_dictionary("cat.nc")
    assert found.label.values.tolist() == ["left", "right"]
    n = int((found.active > 0).all("fold").sum())
    assert f"{n} of 64 latents have labels; the dictionary is in cat.nc" in result.output
    sheet = pathlib.Path("cat.html").read_text(encoding="utf-8")
    assert "<title>Latents of unet.up.1.0 at t=1, cond</title>" in sheet


def test_labellers_of_the_working_folder_are_found(run, tmp_path):
    (tmp_path / "labels_of_this_test.py").write_text(
        "import numpy\n\n\ndef halves(image):\n    top = numpy.arange(image.shape[1])[:, None] < image.shape[1] // 2\n"
        "    return {'top': top & numpy.ones(image.shape[1:], bool)}\n"
    )
    mediation.SparseAutoencoder(8, 16, 2, place=mediation.Place("unet.down.0.0")).save_pretrained("sae")
    before = list(sys.path)
    arguments = ["sae", "dictionary", "sae", "--prompt", "a cat", "--prompt", "a dog", "--steps", 2]
    result = run(*arguments, "--labeller", "labels_of_this_test:halves")
    assert sys.modules.pop("labels_of_this_test").__file__ == str(tmp_path / "labels_of_this_test.py")
    assert result.exit_code == 0, result.output
    found = open_dictionary("dictionary.nc")
    assert (found.label.values.tolist(), found.attrs["labeller"]) == (["top"], "halves")
    numpy.testing.assert_array_equal(found.area / found.n_positions, [[0.5], [0.5]])
    assert sys.path == before, "it is looked at for the labeller only"
    for wrong, message in (("labels_of_nothing:f", "No module named"), ("mylabels", "named as module:function")):
        result = run(*arguments, "--labeller", wrong)
        assert result.exit_code == 1
        assert message in result.output
        assert sys.path == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "a-file", "--site", "unet.mid.0", "--prompt", "a cat"], "a-file is a file, and an autoencoder is"),
        (["dictionary", "sae", "--prompt", "a cat", "--output", "nowhere/cat.nc"], "there is no folder nowhere"),
        (["dictionary", "sae", "--prompt", "a cat", "--sheet", "nowhere/cat.html"], "there is no folder nowhere"),
    ],
)
def test_outputs_that_cannot_be_written_are_noticed_before_anything_is_drawn(run, monkeypatch, arguments, message):
    def draw(*arguments, **options):
        raise AssertionError("nothing is to be drawn")

    for name in ("train_sae", "concept_dictionary"):
        monkeypatch.setattr(mediation, name, draw)
    mediation.SparseAutoencoder(8, 16, 2, place=mediation.Place("unet.down.0.0")).save_pretrained("sae")
    pathlib.Path("a-file").touch()
    result = run("sae", *arguments)
    assert result.exit_code == 1
    assert f"error: {message}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "out", "--site", "unet.mid.0"], "error: no prompts were given"),
        (["train", "out", "--site", "nowhere", "--prompt", "a cat"], "error: 'nowhere' is no site"),
        (["show", "nowhere"], "has no autoencoder"),
        (["dictionary", "nowhere", "--prompt", "a cat"], "has no autoencoder"),
    ],
)
def test_mistakes_become_messages(run, arguments, message):
    result = run("sae", *arguments)
    assert result.exit_code == 1
    assert message in result.output
