"""`mediation sae`: the examples in its help run, in their order, and do what the functions do."""

import json
import pathlib
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

import mediation
from mediation import bundled
from mediation.autoencoders.files import open_dictionary
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
