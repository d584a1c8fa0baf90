"""The tracing guide does what it says: its Python and its commands run, in order, and leave what they promise."""

import functools

import numpy
import pytest

import mediation
from mediation.mapfiles import open_map
from tests.guides import run_commands, run_python

GUIDE = "docs/tracing.md"
pytestmark = pytest.mark.no_cover  # what guides show has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    """As written, but that tracing takes one step and the sites of the middle block, and intervals fewer resamples."""
    monkeypatch.chdir(tmp_path)
    trace = mediation.trace

    def trace_little(pipe, cases, **options):
        sites = mediation.sites(pipe, name="unet.mid.0.resnet" if "images" in options else "unet.mid.*")
        options |= {"sites": sites, "num_inference_steps": 1, "progress": False}
        return trace(pipe, cases, **options)

    monkeypatch.setattr(mediation, "trace", trace_little)
    monkeypatch.setattr(mediation, "compare", functools.partial(mediation.compare, n_resamples=100))
    names = run_python(GUIDE)
    assert names["effects"].equals(names["again"])
    assert names["effects"].attrs["guidance_scale"] == names["sampling"]["guidance_scale"]
    assert names["pictured"].image_site.values.tolist() == ["unet.mid.0.resnet"]
    assert names["agreement"].attrs["n_places"] == names["effects"].sizes["site"] >= 5


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cases.csv").write_text(
        "prompt,subject,attribute\na cat in ink style,ink,style\nan ink dog,ink,style\n"
    )
    (tmp_path / "prompts.txt").write_text("a cat in ink style\nan ink dog\n")
    texts = ('ink --sites "unet.mid.*"', 'cat --sites "unet.mid.*"', "last_subject,eos")
    less = {f"{text} --steps 2": f"{text} --steps 1" for text in texts}
    commands = run_commands(GUIDE, less)
    assert {command[1] for command in commands} == {"sites", "trace", "plot", "compare"}
    maps = {name: open_map(f"{name}.nc") for name in ("ink", "cat", "text", "windows", "blocks", "layers")}
    assert all(numpy.isfinite(effects.restored).all() for effects in maps.values())
    assert maps["text"].token.values.tolist() == ["last_subject", "eos"]
    assert maps["windows"].metric.values.tolist() == ["clip_score", "image_mse"]
    assert set(maps["blocks"].component.values) == {"block"}
    assert {name.count("+") for name in maps["layers"].site.values} == {2}
    assert maps["blocks"].seed.values.tolist() == [0, 1]
    assert (tmp_path / "windows.png").exists()
