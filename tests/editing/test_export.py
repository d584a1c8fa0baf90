"""Export and import: round trips through the real loaders, names, and files that are refused."""

import importlib.util
import json

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers.loaders import lora_base

import editing
import mediation
from editing import lora
from editing.edit import Edit, measure
from editing.updates import LowRank
from mediation.parameters import fingerprint
from tests import tiny

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
FORMATS = lora.FORMATS
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def edits(pipe):
    """What the package makes: of attention, of MLPs alone, of the U-Net, and of several at once, in several ranks."""
    attention = editing.quickfix(pipe, {"ink": "noto"}, templates=["{}", "a {}"])
    mlp = editing.quickfix(pipe, {"ink": "noto"}, site="text_encoder.1.mlp")
    unet = editing.cross_attention_edit(pipe, {"ink": ""}, layers=[0, 9], tokens="last_subject")
    unet = unet + editing.cross_attention_edit(pipe, {"cat": "dog"}, layers=[9], tokens="last_subject")
    return {"attention": attention, "mlp": mlp, "unet": unet, "all": attention + mlp + unet}


@pytest.fixture(scope="module")
def made():
    return edits(tiny.stable_diffusion())


def picture(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a ink cat", num_inference_steps=2, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def pictures(made):
    """Of the pipeline as it is, and of each edit."""
    pipe = tiny.stable_diffusion()
    found = {"plain": picture(pipe)}
    for kind, edit in made.items():
        with edit.applied(pipe):
            found[kind] = picture(pipe)
    return found


def states(pipe):
    """Every weight, by network and name."""
    return {
        f"{network}.{name}": value.clone()
        for network in ("text_encoder", "unet", "vae")
        for name, value in getattr(pipe, network).state_dict().items()
    }


def same(a, b, atol):
    assert set(a.updates) == set(b.updates)
    for name, update in a.updates.items():
        torch.testing.assert_close(b.updates[name].dense(), update.dense(), rtol=0, atol=atol)


@needs_peft
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["attention", "mlp", "unet", "all"])
def test_the_real_loader_makes_the_edits_images(made, pictures, kind, format, tmp_path, fresh_pipe):
    """To 1e-4 of the range of pixels: an adapter adds W x and up down x, an edit multiplies by their rounded sum."""
    edit = made[kind]
    plain, expected = pictures["plain"], pictures[kind]
    assert (expected - plain).abs().max() > 1e-3, "there was something to see"
    edit.export_lora(tmp_path / "edit.safetensors", format=format)
    fresh_pipe.load_lora_weights(tmp_path, weight_name="edit.safetensors")
    torch.testing.assert_close(picture(fresh_pipe), expected, rtol=0, atol=1e-4)
    fresh_pipe.unload_lora_weights()
    torch.testing.assert_close(picture(fresh_pipe), plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["attention", "mlp", "unet", "all"])
def test_what_is_imported_is_what_was_exported(made, kind, format, tmp_path, tiny_pipe):
    edit = made[kind]
    edit.export_lora(tmp_path / "edit.safetensors", format=format)
    back = editing.import_lora(tmp_path / "edit.safetensors", tiny_pipe)
    same(edit, back, atol=0)
    assert back.metadata["base"] == edit.metadata["base"]
    assert back.metadata["of"][0]["method"] == edit.metadata["method"]
    with back.applied(tiny_pipe):
        pass


@needs_peft
@pytest.mark.parametrize("format", FORMATS)
def test_edits_of_sd_2_come_back_and_are_loaded_likewise(format, tmp_path):
    pipe = tiny.stable_diffusion_2()
    edit, plain = edits(pipe)["all"], picture(pipe)
    edit.export_lora(tmp_path / "edit.safetensors", format=format)
    same(edit, editing.import_lora(tmp_path / "edit.safetensors", pipe), atol=0)
    with edit.applied(pipe):
        expected = picture(pipe)
    assert (expected - plain).abs().max() > 1e-3, "there was something to see"
    pipe.load_lora_weights(tmp_path, weight_name="edit.safetensors")
    torch.testing.assert_close(picture(pipe), expected, rtol=0, atol=1e-4)


def test_key_names_are_those_of_each_dialect(made, tmp_path):
    made["attention"].export_lora(tmp_path / "a.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == {
        f"{LAYER}.lora_A.weight",
        f"{LAYER}.lora_B.weight",
    }
    made["attention"].export_lora(tmp_path / "b.safetensors", format="kohya")
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    stem = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    assert set(tensors) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert tensors[f"{stem}.alpha"] == 2.0 == len(tensors[f"{stem}.lora_down.weight"]), "alpha is the rank"
    made["unet"].export_lora(tmp_path / "c.safetensors", format="kohya")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert f"{stem}.lora_up.weight" in safetensors.torch.load_file(tmp_path / "c.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["edit"])["pairs"] == {"ink": "noto"}


def test_all_ranks_of_a_network_are_filled_up_to_one(made, tmp_path):
    """Loaders take the alpha of one layer for all of them: with ranks that differ, the others would be scaled."""
    edit = made["unet"]
    assert {update.rank for update in edit.updates.values()} == {1, 2}
    edit.export_lora(tmp_path / "edit.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "edit.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {2}


def test_names_of_a_pipeline_with_two_text_encoders(made, tmp_path):
    (update,) = made["attention"].updates.values()
    names = [f"{encoder}.text_model.encoder.layers.0.mlp.fc1.weight" for encoder in ("text_encoder", "text_encoder_2")]
    metadata = {"of": [{"method": "x"}, {"pipeline": {"class": "StableDiffusionXLPipeline"}}]}
    lora.write(tmp_path / "two.safetensors", dict.fromkeys(names, update), metadata, format="kohya")
    stems = {name.split(".")[0] for name in safetensors.torch.load_file(tmp_path / "two.safetensors")}
    assert stems == {f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2)}


def test_a_foreign_file_is_scaled_by_alpha_over_rank(tmp_path, tiny_pipe):
    up, down = torch.randn(32, 4), torch.randn(4, 32)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    tensors = {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down.half(),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    safetensors.torch.save_file(tensors, tmp_path / "foreign.safetensors")
    (update,) = editing.import_lora(tmp_path / "foreign.safetensors", tiny_pipe).updates.values()
    torch.testing.assert_close(update.dense(), 0.25 * up.double() @ down.half().double(), rtol=0, atol=1e-5)


ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


def adapter_file(path, endings=("lora_A.weight", "lora_B.weight"), **config):
    """A LoRA of two layers of the U-Net, with PEFT's configuration of them in the header."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for stem, d_in in ((f"{ATTENTION}.to_k", 32), (f"{ATTENTION}.to_q", 16)):
        for ending, shape in zip(endings, ((4, d_in), (16, 4)), strict=True):
            tensors[f"{stem}.{ending}"] = torch.randn(shape, generator=random)
    header = json.dumps({f"unet.{key}": value for key, value in config.items()})
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": header})
    return tensors


@pytest.mark.parametrize(
    ("config", "of_key", "of_query"),
    [
        ({"r": 4, "lora_alpha": 16}, 4, 4),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8, 8),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_k": 12}}, 3, 0.5),
        ({"r": 4, "lora_alpha": 2, "alpha_pattern": {r"^mid_block\..*attn2\.to_q": 12}}, 0.5, 3),
        ({"r": 8, "lora_alpha": 4, "rank_pattern": {"to_[kq]": 4}, "alpha_pattern": {"o_k": 1}}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_the_header_tells_how_strong_each_layer_is(config, of_key, of_query, tmp_path, tiny_pipe):
    tensors = adapter_file(tmp_path / "adapter.safetensors", **config)
    updates = editing.import_lora(tmp_path / "adapter.safetensors", tiny_pipe).updates
    for layer, scale in (("to_k", of_key), ("to_q", of_query)):
        down, up = (tensors[f"{ATTENTION}.{layer}.lora_{part}.weight"].double() for part in "AB")
        found = updates[f"{ATTENTION}.{layer}.weight"].dense()
        torch.testing.assert_close(found, scale * up @ down, rtol=1e-6, atol=1e-5)


def test_a_header_of_other_networks_says_nothing(tmp_path, tiny_pipe):
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(4, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 4)}
    header = json.dumps({"unet.r": 4, "unet.lora_alpha": 16})
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": header})
    (update,) = editing.import_lora(tmp_path / "a.safetensors", tiny_pipe).updates.values()
    assert (update.dense() == 4).all()


@pytest.mark.parametrize("config", [{"r": 8, "lora_alpha": 8}, {"r": 4}, {"lora_alpha": 4}])
def test_a_header_that_does_not_fit_the_factors_is_refused(config, tmp_path, tiny_pipe):
    adapter_file(tmp_path / "adapter.safetensors", **config)
    with pytest.raises(ValueError, match=r"to_k.weight by factors of rank 4, and says in its header that the rank is"):
        editing.import_lora(tmp_path / "adapter.safetensors", tiny_pipe)


@needs_peft
@pytest.mark.skipif(not hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY"), reason="this diffusers reads no header")
def test_a_header_means_what_the_real_loader_takes_it_for(tmp_path, fresh_pipe):
    layers = [f"{ATTENTION}.{name}".removeprefix("unet.") for name in ("to_k", "to_q")]
    config = {"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_q": 1}, "target_modules": layers}
    adapter_file(tmp_path / "adapter.safetensors", **config)
    plain = picture(fresh_pipe)
    with editing.import_lora(tmp_path / "adapter.safetensors", fresh_pipe).applied(fresh_pipe):
        ours = picture(fresh_pipe)
    assert (ours - plain).abs().max() > 1e-3, "there was something to see"
    fresh_pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    torch.testing.assert_close(picture(fresh_pipe), ours, rtol=0, atol=1e-4)


def test_diffusers_own_names_in_a_unet_are_read(tmp_path, tiny_pipe):
    adapter_file(tmp_path / "peft.safetensors")
    adapter_file(tmp_path / "diffusers.safetensors", ("lora.down.weight", "lora.up.weight"))
    read = [editing.import_lora(tmp_path / f"{name}.safetensors", tiny_pipe) for name in ("peft", "diffusers")]
    same(*read, atol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.lora_A.weight": torch.ones(1, 32)}, "is incomplete: of .*out_proj.weight it has down only"),
        ({"unet.nothing.lora_A.weight": torch.ones(1, 2)}, "'unet.nothing', which is no linear layer of this"),
        ({f"{LAYER}.dora_scale": torch.ones(1)}, "dora_scale', which is no part of a plain LoRA"),
        ({}, "is no LoRA file: it is empty"),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(0, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 0)},
            "out_proj.weight by factors of rank 0",
        ),
        (
            {f"{LAYER}.lora_A.weight": torch.ones(1, 32, 1, 1), f"{LAYER}.lora_B.weight": torch.ones(32, 1, 1, 1)},
            "by a convolution",
        ),
    ],
)
def test_files_that_are_no_lora_for_this_pipeline_are_refused(tensors, message, tmp_path, tiny_pipe):
    safetensors.torch.save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        editing.import_lora(tmp_path / "bad.safetensors", tiny_pipe)


def test_pickles_are_refused(made, tmp_path, tiny_pipe):
    with pytest.raises(ValueError, match=r"end in .safetensors"):
        made["attention"].export_lora(tmp_path / "edit.pt")
    with pytest.raises(ValueError, match=r"end in .safetensors"):
        editing.import_lora(tmp_path / "edit.pt", tiny_pipe)
    with pytest.raises(ValueError, match="format must be one of diffusers, kohya; got 'a1111'"):
        made["attention"].export_lora(tmp_path / "edit.safetensors", format="a1111")
    assert not list(tmp_path.iterdir())


def test_a_change_without_factors_is_refused(tiny_pipe, tmp_path, made):
    class Dense:
        shape, rank = (32, 32), 32

    (name,) = made["attention"].updates
    with pytest.raises(ValueError, match=r"has no low-rank factors: use editing.export_pipeline"):
        lora.write(tmp_path / "dense.safetensors", {name: Dense()}, {}, format="kohya")


def test_an_exported_pipeline_is_the_edited_one(made, fresh_pipe, tmp_path):
    edit = made["all"]
    plain = picture(fresh_pipe)
    with edit.applied(fresh_pipe):
        expected, weights = picture(fresh_pipe), states(fresh_pipe)
    editing.export_pipeline(edit, fresh_pipe, tmp_path / "edited")
    assert torch.equal(picture(fresh_pipe), plain), "the pipeline is as it was"
    edited = mediation.load_pipeline(tmp_path / "edited")
    edited.set_progress_bar_config(disable=True)
    assert all(torch.equal(value, weights[name]) for name, value in states(edited).items())
    # Where a loader maps the file into memory, kernels for unaligned weights round otherwise.
    torch.testing.assert_close(picture(edited), expected, rtol=0, atol=1e-5)
    same(editing.load(tmp_path / "edited" / "edit.safetensors"), edit, atol=0)
    with pytest.raises(ValueError, match="another base model"):
        edit.apply(edited)  # once is enough
    with pytest.raises(FileExistsError, match="is not empty: name a new folder"):
        editing.export_pipeline(edit, fresh_pipe, tmp_path / "edited")


def test_a_pipeline_in_half_precision_is_exported_in_it(made, fresh_pipe, tmp_path):
    pipe = fresh_pipe.to(torch.float16)
    edit = made["attention"]
    editing.export_pipeline(edit, pipe, tmp_path / "half")
    (name,) = edit.updates
    with edit.applied(pipe):
        expected = fingerprint(pipe, name)["sha256"]
    edited = mediation.load_pipeline(tmp_path / "half").to(torch.float16)
    assert fingerprint(edited, name)["sha256"] == expected
    (file,) = (tmp_path / "half" / "text_encoder").glob("*.safetensors")
    assert {tensor.dtype for tensor in safetensors.torch.load_file(file).values()} <= {torch.float16, torch.int64}


def test_an_imported_edit_can_be_scaled_added_and_compressed(made, fresh_pipe, tmp_path):
    made["attention"].export_lora(tmp_path / "edit.safetensors")
    back = editing.import_lora(tmp_path / "edit.safetensors", fresh_pipe)
    both = (back + made["mlp"].scaled(0.5)).compress(1)
    assert isinstance(both, Edit)
    assert all(isinstance(update, LowRank) and update.rank == 1 for update in both.updates.values())
    assert measure(both.updates, both.metadata["base"]).keys() == both.updates.keys()
    both.export_lora(tmp_path / "both.safetensors", format="kohya")
    same(editing.import_lora(tmp_path / "both.safetensors", fresh_pipe), both, atol=0)
