"""Edits of Stable Diffusion XL, of both text encoders and of the denoiser: formulas, bits, pictures and LoRA files."""

import importlib.util

import numpy
import pytest
import torch

import editing
from editing import lora
from mediation.sites import sites
from tests import tiny

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
# position of the last subject token: "ink" is one token, "noto" is spelled
PROMPTS = [("ink", 1, "noto", 4), ("a ink cat", 2, "a noto cat", 5)]
TEMPLATES = ["{}", "a {} cat"]
NETWORKS = ("text_encoder", "text_encoder_2", "unet")
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


@pytest.fixture(scope="module")
def pipe():
    """Shared: leave it as it was."""
    return tiny.stable_diffusion_xl()


@pytest.fixture(scope="module")
def made(pipe):
    """Edits of both encoders, of one alone, of its MLP, of the denoiser, and of everything."""
    both = editing.quickfix(pipe, {"ink": "noto"}, templates=TEMPLATES)
    found = {
        "both": both,
        "second": editing.quickfix(pipe, {"ink": "noto"}, site="text_encoder_2.0.self_attention"),
        "mlp": editing.quickfix(pipe, {"ink": "noto"}, site="text_encoder_2.1.mlp"),
        "unet": editing.cross_attention_edit(pipe, {"ink": ""}, layers=[0, 5], tokens="last_subject"),
    }
    return found | {"all": both + found["mlp"] + found["unet"]}


def states(pipe, prompt):
    """What the denoiser reads of a prompt: each token's state, (token, dim), without the pooled embedding."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0].double().numpy()


def keys_of(pipe, module, prompt):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double().numpy()))
    states(pipe, prompt)
    handle.remove()
    return seen[0]


def closed_form(base, pairs, regularization):
    """(lambda W0 + sum v k^T) (lambda I + sum k k^T)^-1 - W0, of (key, key of the target) pairs."""
    left, right = regularization * base, regularization * numpy.eye(base.shape[1])
    for key, target in pairs:
        left = left + numpy.outer(base @ target, key)
        right = right + numpy.outer(key, key)
    return numpy.linalg.solve(right, left.T).T - base


def weights(pipe):
    return {
        f"{network}.{name}": value.clone()
        for network in NETWORKS
        for name, value in getattr(pipe, network).state_dict().items()
    }


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a ink cat", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def pictures(pipe, made):
    """Of the pipeline as it is, and of each edit."""
    found = {"plain": picture(pipe)}
    for kind, edit in made.items():
        with edit.applied(pipe):
            found[kind] = picture(pipe)
    return found


def test_both_encoders_are_edited_each_by_the_papers_formula(pipe):
    edit = editing.quickfix(pipe, {"ink": "noto"}, templates=TEMPLATES, regularization=0.3)
    assert [name.partition(".")[0] for name in edit.updates] == ["text_encoder", "text_encoder_2"]
    for name, update in edit.updates.items():
        network = name.partition(".")[0]
        (site, *_) = sites(pipe, network=network, component="self_attention")
        module = site.module(pipe).out_proj
        pairs = [
            (keys_of(pipe, module, source)[a], keys_of(pipe, module, target)[b]) for source, a, target, b in PROMPTS
        ]
        expected = closed_form(module.weight.detach().double().numpy(), pairs, 0.3)
        numpy.testing.assert_allclose(update.dense().numpy(), expected, rtol=0, atol=1e-5)
        assert numpy.abs(expected).max() > 0.05, "there was something to change"
    assert [entry["network"] for entry in edit.report["residual"]] == ["text_encoder", "text_encoder_2"]


def test_cross_attentions_are_edited_by_the_states_of_both_encoders(pipe):
    edit = editing.cross_attention_edit(pipe, {"ink": "noto"}, tokens="last_subject", templates=TEMPLATES)
    pairs = [(states(pipe, source)[a], states(pipe, target)[b]) for source, a, target, b in PROMPTS]
    n_layers = len(sites(pipe, network="unet", component="cross_attention"))
    assert len(edit.updates) == 2 * n_layers, "to_k and to_v of each, and not the embedding of the pooled text"
    for name, update in edit.updates.items():
        base = pipe.unet.get_parameter(name.removeprefix("unet.")).detach().double().numpy()
        assert base.shape[1] == 32 + 48
        numpy.testing.assert_allclose(update.dense().numpy(), closed_form(base, pairs, 0.5), rtol=0, atol=2e-5)


@pytest.mark.parametrize("site", ["text_encoder.2.self_attention", "text_encoder.2.mlp"])
def test_a_layer_that_nothing_reads_is_not_edited(pipe, site):
    with pytest.raises(ValueError, match=rf"{site} would change no picture: .* reads what the first 2 of 3 layers"):
        editing.quickfix(pipe, {"ink": "noto"}, site=site)
    with pytest.raises(ValueError, match="would change no picture"):
        editing.Fitter(pipe, site=site)
    edit = editing.quickfix(pipe, {"ink": "noto"}, site=site.replace("encoder", "encoder_2"))
    plain = picture(pipe)
    with edit.applied(pipe):
        assert (picture(pipe) - plain).abs().max() > 1e-6, "by the pooled embedding alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_edits_come_off_bit_by_bit(made, dtype):
    pipe = tiny.stable_diffusion_xl().to(dtype)
    before = weights(pipe)
    with made["both"].applied(pipe), made["mlp"].applied(pipe), made["unet"].applied(pipe):
        changed = {name for name, value in weights(pipe).items() if not torch.equal(value, before[name])}
    assert changed == set(made["all"].updates)
    assert {name.partition(".")[0] for name in changed} == set(NETWORKS)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


def test_a_saved_edit_is_the_same_edit(made, pictures, pipe, tmp_path):
    made["all"].save(tmp_path / "all.safetensors")
    loaded = editing.load(tmp_path / "all.safetensors")
    plain, expected = pictures["plain"], pictures["all"]
    with loaded.applied(pipe):
        assert torch.equal(picture(pipe), expected)
    assert (expected - plain).abs().max() > 1e-3, "there was something to see"
    assert torch.equal(picture(pipe), plain)


@needs_peft
@pytest.mark.parametrize("format", lora.FORMATS)
@pytest.mark.parametrize("kind", ["both", "second", "mlp", "unet", "all"])
def test_the_real_loader_makes_the_edits_images(made, pictures, kind, format, tmp_path):
    """To 1e-4 of the range of pixels: an adapter adds W x and up down x, an edit multiplies by their rounded sum."""
    edit, pipe = made[kind], tiny.stable_diffusion_xl()
    plain, expected = pictures["plain"], pictures[kind]
    assert (expected - plain).abs().max() > 1e-3, "there was something to see"
    edit.export_lora(tmp_path / "edit.safetensors", format=format)
    pipe.load_lora_weights(tmp_path, weight_name="edit.safetensors")
    torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(picture(pipe), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", lora.FORMATS)
@pytest.mark.parametrize("kind", ["both", "second", "mlp", "unet", "all"])
def test_what_is_imported_is_what_was_exported(made, pipe, kind, format, tmp_path):
    edit = made[kind]
    edit.export_lora(tmp_path / "edit.safetensors", format=format)
    back = editing.import_lora(tmp_path / "edit.safetensors", pipe)
    assert set(back.updates) == set(edit.updates)
    for name, update in edit.updates.items():
        assert torch.equal(back.updates[name].dense(), update.dense())
    assert back.metadata["base"] == edit.metadata["base"]
