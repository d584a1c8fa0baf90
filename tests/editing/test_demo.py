"""The demonstration leaves behind what it says."""

import functools
import re

import torch
import xarray
from matplotlib.figure import Figure
from typer.testing import CliRunner

import editing
import mediation
from editing import demo
from mediation.cli import app


def test_help_teaches():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert "mediation demo --output" in result.output


def test_it_saves_figures_maps_and_an_edit_that_works(tmp_path, monkeypatch):
    """One case, few sites and tokens, half of the pictures, one step, and coarse figures: of the same kinds."""
    sites = mediation.sites

    def few_sites(pipe, **chosen):
        return sites(pipe, **chosen)[::10]

    monkeypatch.setattr(mediation, "sites", few_sites)
    monkeypatch.setattr(demo, "_TOKENS", ("subject", "eos"))
    monkeypatch.setattr(demo, "_CASES", {attribute: cases[:1] for attribute, cases in demo._CASES.items()})
    monkeypatch.setattr(demo, "_IMAGE_STEPS", 1)
    monkeypatch.setattr(demo, "_TARGETS", demo._TARGETS[::2])
    monkeypatch.setattr(demo, "_BYSTANDERS", demo._BYSTANDERS[::2])
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: savefig(figure, path, dpi=dpi / 4))
    monkeypatch.setattr(mediation, "load_pipeline", functools.cache(mediation.load_pipeline))
    used, sample = {}, demo._sample

    def spy(pipe, pictures, guidance_scale, title):
        used[title] = {name: weight.clone() for name, weight in pipe.text_encoder.named_parameters()}
        return sample(pipe, pictures, guidance_scale, title)

    monkeypatch.setattr(demo, "_sample", spy)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--steps", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("unet_maps.png", "text_encoder_maps.pdf", "before_after.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert name in result.output
    effects = xarray.load_dataset(tmp_path / "style_unet.nc", engine="scipy")
    best = mediation.top_sites(effects, k=1)[0]
    assert f"{best}: " in result.output
    pipe = mediation.load_pipeline()
    edit = editing.load(tmp_path / "ink_to_noto.safetensors")
    (name,) = edit.updates
    with edit.applied(pipe):
        (changed,) = (key for key, weight in used["before"].items() if not torch.equal(weight, used["after"][key]))
        assert torch.equal(pipe.text_encoder.get_parameter(changed), used["after"][changed])
    assert name.endswith(changed)
    assert re.search(r"edit ink -> noto: \d+ ms", result.output)
    assert re.search(r"targets +style is noto +\d+% +\d+% +n=3", result.output)
    assert edit.metadata["pairs"] == {"ink": "noto"}
