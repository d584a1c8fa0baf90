"""Pipelines are loaded safely and as asked, or refused with a reason."""

import shutil

import pytest
import safetensors.torch
import torch

import mediation
from mediation.pipelines import family_of
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "tiny"
    tiny.stable_diffusion().to(torch.float16).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")  # the name that all supported versions know
def test_weights_become_float32_unless_a_dtype_is_asked_for(folder):
    assert mediation.load_pipeline(folder).unet.dtype == torch.float32
    half = mediation.load_pipeline(folder, torch_dtype=torch.float16)
    assert (half.unet.dtype, half.text_encoder.dtype) == (torch.float16, torch.float16)
    weights = half.unet.conv_in.weight
    torch.testing.assert_close(mediation.load_pipeline(folder).unet.conv_in.weight, weights.float(), atol=0, rtol=0)


def test_loading_needs_no_accelerate(folder, monkeypatch):
    monkeypatch.setattr("mediation.pipelines.is_accelerate_available", lambda: False)
    assert mediation.load_pipeline(folder).unet.dtype == torch.float32


def test_pickled_weights_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        mediation.load_pipeline(tmp_path / "pickled")
    with pytest.raises(ValueError, match="from safetensors files only"):
        mediation.load_pipeline(folder, use_safetensors=False)


def test_other_objects_and_pipelines_are_refused(tiny_pipe):
    with pytest.raises(TypeError, match="expected a diffusers pipeline, got Linear"):
        family_of(torch.nn.Linear(1, 1))
    other = type("KandinskyPipeline", (type(tiny_pipe).__mro__[1],), {})
    with pytest.raises(ValueError, match="no family is known for KandinskyPipeline; supported pipelines: Stable"):
        family_of(other.__new__(other))
