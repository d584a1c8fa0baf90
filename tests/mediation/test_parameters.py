"""Parameters: which ones a user means, what site they are part of, and what they are called in files."""

import pytest
import torch

import mediation
from mediation.parameters import canonical, choose, digest, native
from tests import tiny


def parameters(pipe, network="unet"):
    return {f"{network}.{path}": parameter for path, parameter in getattr(pipe, network).named_parameters()}


def test_the_default_is_the_weights_of_all_feed_forwards():
    pipe = tiny.stable_diffusion(unet={"layers_per_block": 2})
    found = choose(pipe, None)
    expected = {name for name, p in parameters(pipe).items() if ".ff." in name and p.ndim == 2}
    assert set(found) == expected
    assert len(found) == 32, "as in Stable Diffusion 1.x"
    sites = mediation.sites(pipe, network="unet", component="feed_forward")
    assert list(dict.fromkeys(found.values())) == sites, "in execution order"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_site_stands_for_its_weights_without_biases_and_norms(family):
    pipe = tiny.shallow(family)
    for site in mediation.sites(pipe):
        found = choose(pipe, site)
        inside = parameters(pipe, site.network)
        modules = dict(site.module(pipe).named_parameters())
        expected = {f"{site.network}.{site.path}.{path}" for path, p in modules.items() if p.ndim > 1}
        assert set(found) == expected, site.name
        assert expected, site.name
        assert set(found.values()) == {site}
        assert expected <= set(inside)


def test_globs_are_of_sites_first_and_of_parameters_otherwise(tiny_pipe):
    attentions = choose(tiny_pipe, ["unet.mid.*attention", "text_encoder.0.mlp"])
    assert {site.name for site in attentions.values()} == {
        "text_encoder.0.mlp",
        "unet.mid.0.self_attention",
        "unet.mid.0.cross_attention",
    }
    assert next(iter(attentions)).startswith("text_encoder."), "which run first"
    biases = choose(tiny_pipe, "unet.mid_block.attentions.*.attn1.to_out.0.bias")
    (site,) = biases.values()
    assert site.name == "unet.mid.0.self_attention"
    block = mediation.sites(tiny_pipe, component="block", block="mid")[0]
    assert set(choose(tiny_pipe, block)) == {
        name for name, p in parameters(tiny_pipe).items() if name.startswith("unet.mid_block.") and p.ndim > 1
    }


def test_what_is_in_no_site_is_told_by_its_module(tiny_pipe):
    found = choose(tiny_pipe, ["unet.conv_in.*", "unet.mid.0.feed_forward"])
    assert [site.component for site in found.values()] == ["feed_forward", "feed_forward", "other", "other"]
    (other,) = {site for site in found.values() if site.component == "other"}
    assert (other.name, other.network, other.layer, other.path) == ("unet.conv_in.other", "unet", -1, "conv_in")


def test_a_digest_is_of_every_weight_and_of_nothing_else(fresh_pipe):
    plain = digest(fresh_pipe)
    assert plain == digest(tiny.stable_diffusion())
    assert plain != digest(tiny.stable_diffusion(seed=1))
    for network in (fresh_pipe.text_encoder, fresh_pipe.unet, fresh_pipe.vae):
        weight = next(network.parameters()).detach()
        before = weight.clone()
        weight.view(-1)[3] = torch.nextafter(before.view(-1)[3], torch.tensor(0.0))
        assert digest(fresh_pipe) != plain, "by the last bit of one weight"
        weight.copy_(before)
        assert digest(fresh_pipe) == plain
    assert digest(fresh_pipe.to(torch.bfloat16)) != plain


def test_loaded_lora_layers_change_neither_the_choice_nor_the_scores(fresh_pipe):
    """New LoRA layers are the identity, so that scores are those of the model without."""
    peft = pytest.importorskip("peft")
    chosen = [None, "unet.mid.*", "text_encoder.1.*", "unet.mid_block.attentions.*.attn1.to_out.0.*"]
    options = {"parameters": chosen[1:3], "num_inference_steps": 2, "progress": False}
    before, scores = [choose(fresh_pipe, one) for one in chosen], mediation.attribute(fresh_pipe, "a cat", **options)
    fresh_pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2", "conv2"]))
    fresh_pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "fc2"], use_dora=True))
    names = [path for path, _ in fresh_pipe.unet.named_parameters()]
    assert any("lora_A" in name for name in names)
    assert any("base_layer" in name for name in names)
    found = [choose(fresh_pipe, one) for one in chosen]
    assert found == before
    assert [list(one) for one in found] == [list(one) for one in before], "in the same order"
    wrapped = mediation.attribute(fresh_pipe, "a cat", **options)
    assert wrapped.base == scores.base
    for name, score in scores.scores.items():
        torch.testing.assert_close(wrapped.scores[name], score, rtol=1e-3, atol=1e-4 * float(score.abs().max()))


def test_mistakes(tiny_pipe):
    with pytest.raises(KeyError, match=r"'unet\.engine' matches no site and no parameter"):
        choose(tiny_pipe, "unet.engine")
    with pytest.raises(KeyError, match=r"'vae\.\*' matches no site"):
        choose(tiny_pipe, "vae.*")
    with pytest.raises(ValueError, match="no parameters were given"):
        choose(tiny_pipe, [])
    with pytest.raises(ValueError, match="is a single head"):
        choose(tiny_pipe, mediation.sites(tiny_pipe, heads=True)[0])
    with pytest.raises(TypeError, match="sites are Site objects or names, got int"):
        choose(tiny_pipe, [3])


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        ("text_encoder_2.encoder.layers.3.mlp.fc2.weight", "text_encoder_2.text_model.encoder.layers.3.mlp.fc2.weight"),
        ("text_encoder.final_layer_norm.weight", "text_encoder.text_model.final_layer_norm.weight"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.o.weight", None),  # T5 has one layout
        ("text_encoder_2.text_projection.weight", None),
        ("unet.mid_block.attentions.0.proj_in.weight", None),
    ],
)
def test_names_on_disk_are_those_of_checkpoints(flat, name, monkeypatch):
    name = name or flat
    assert canonical(flat) == canonical(name) == name
    for wrapped, expected in ((True, name), (False, flat)):
        monkeypatch.setattr("mediation.parameters._WRAPPED", wrapped)
        assert native(name, "CLIPTextModel") == expected
        assert native(name, "CLIPTextModelWithProjection") == name
