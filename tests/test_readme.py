"""The README does what it says: its Python runs."""

import PIL.Image
import pytest
import torch

import mediation
from tests.guides import run_python

pytestmark = pytest.mark.no_cover  # what the README shows has tests of its own


def test_the_python_runs(tmp_path, monkeypatch):
    """As written, but that tracing takes one step in place of 25, and every fifth site, and drawing two steps."""
    monkeypatch.chdir(tmp_path)
    trace = mediation.trace

    def trace_little(pipe, cases, *, sites):
        return trace(pipe, cases, sites=sites[::5], num_inference_steps=1, progress=False)

    monkeypatch.setattr(mediation, "trace", trace_little)
    names = run_python("README.md", {'style of ink").images': 'style of ink", num_inference_steps=2).images'})
    pipe, effects, edit = names["pipe"], names["effects"], names["edit"]
    assert effects.site.values.tolist() == [site.name for site in mediation.sites(pipe, network="unet")[::5]]
    assert effects.prompt.values.tolist() == names["prompts"]
    assert (mediation.total_effect(effects) != 0).all()
    untouched = mediation.load_pipeline()
    with edit.applied(untouched):  # as it was saved and loaded
        edited = {name: parameter.clone() for name, parameter in untouched.text_encoder.named_parameters()}
    plain = pipe.text_encoder.named_parameters()
    changed = [name for name, parameter in plain if not torch.equal(parameter, edited[name])]
    assert len(changed) == len(edit.updates) == 1
    with PIL.Image.open("panda.png") as drawn, PIL.Image.open("unet.png") as plotted:
        assert drawn.size == (64, 64)
        assert min(plotted.size) > 64
