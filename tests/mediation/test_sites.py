"""What a family states about an architecture is checked against the running model."""

import collections

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

import mediation
from mediation.pipelines import family_of


def test_every_path_resolves_once(tiny_pipe):
    found = mediation.sites(tiny_pipe)
    assert len({site.name for site in found}) == len({(site.network, site.path) for site in found}) == len(found)
    for site in found:
        assert site.module(tiny_pipe) is getattr(tiny_pipe, site.network).get_submodule(site.path)


def test_sd1_has_the_seventy_layers_of_the_paper(tiny_pipe):
    """22 ResNets, 16 self-attentions, 16 cross-attentions, 16 feed-forwards (arXiv:2310.13730)."""
    counts = collections.Counter(site.component for site in mediation.sites(tiny_pipe, network="unet"))
    assert counts == {"resnet": 22, "self_attention": 16, "cross_attention": 16, "feed_forward": 16}


def test_the_declared_order_is_the_execution_order(tiny_pipe):
    found = mediation.sites(tiny_pipe)
    ran, handles = [], []
    for site in found:
        handles.append(site.module(tiny_pipe).register_forward_hook(lambda *_, name=site.name: ran.append(name)))
    try:
        tiny_pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [site.name for site in found]


def test_every_door_of_text_is_known(tiny_pipe):
    """The denoiser no longer depends on the prompt when the known doors are shut."""
    unet = tiny_pipe.unet
    inputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    texts = torch.randn(2, 1, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    doors = [unet.get_submodule(path) for path in family_of(tiny_pipe).text_doors(unet)]

    def outputs():
        with torch.no_grad():
            return [unet(*inputs, text).sample for text in texts]

    assert not torch.allclose(*outputs())
    handles = [door.register_forward_hook(lambda module, args, output: torch.zeros_like(output)) for door in doors]
    try:
        assert torch.equal(*outputs())
    finally:
        for handle in handles:
            handle.remove()


def test_names_are_those_of_the_design(tiny_pipe):
    names = [site.name for site in mediation.sites(tiny_pipe)]
    assert names[:2] == ["text_encoder.0.self_attention", "text_encoder.0.mlp"]
    assert "unet.down.0.0.cross_attention" in names
    assert "unet.mid.1.resnet" in names
    first = mediation.sites(tiny_pipe, name="unet.down.0.0.cross_attention")[0]
    assert (first.network, first.component, first.layer, first.block) == ("unet", "cross_attention", 0, "down.0")


def test_selection(tiny_pipe):
    up = mediation.sites(tiny_pipe, network="unet", component="cross_attention", block="up.1")
    assert [site.name for site in up] == [f"unet.up.1.{i}.cross_attention" for i in range(3)]
    assert mediation.sites(tiny_pipe, name="unet.up.1.*.cross_attention") == up
    assert [site.component for site in mediation.sites(tiny_pipe, network="text_encoder", layer=1)] == [
        "self_attention",
        "mlp",
    ]
    for wrong in ({"network": "vae"}, {"component": "conv"}, {"layer": 99}, {"block": "left"}, {"name": "*.nothing"}):
        with pytest.raises(ValueError, match="no site"):
            mediation.sites(tiny_pipe, **wrong)


def test_other_pipelines_are_refused_by_name():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(
        ValueError, match="no family is known for DDPMPipeline; supported pipelines: StableDiffusionPipeline"
    ):
        mediation.sites(pipe)
    with pytest.raises(TypeError, match="expected a diffusers pipeline, got AutoencoderKL"):
        mediation.sites(AutoencoderKL())


def test_a_pipeline_without_a_text_encoder_is_refused(tiny_pipe):
    pipe = type(tiny_pipe)(**tiny_pipe.components | {"text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="it has no text_encoder"):
        mediation.sites(pipe)
