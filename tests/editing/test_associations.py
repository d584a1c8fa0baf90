"""Keys and values against a full run of the pipeline's own encoder."""

import pytest
import torch

from editing import associations
from editing.associations import all_finite, associate, projection
from editing.pairing import TOKENS
from mediation.families import StableDiffusion
from mediation.sites import sites
from tests import tiny
from tests.editing.test_pairing import pairs_of, positions


def record(pipe, module, prompts, what):
    """What a module receives ("input") or returns ("output") in a full `encode_prompt`."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(args[0] if what == "input" else output))
    with torch.no_grad():
        pipe.encode_prompt(prompts, "cpu", 1, False)
    handle.remove()
    return seen[0].double()


def gather(recorded, where):
    return torch.stack([recorded[prompt, position] for prompt, position in where.tolist()])


@pytest.mark.parametrize("name", ["0.self_attention", "0.mlp", "2.self_attention", "1.mlp"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_keys_and_values_are_those_of_a_full_run_without_the_bias(tiny_pipe, name, tokens):
    (site,) = sites(tiny_pipe, name=f"text_encoder.{name}")
    found = pairs_of(tiny_pipe, {"ink": "noto", "a cat": "bird"}, tokens, templates=None, preserve=["dog"])
    known = associate(tiny_pipe, site, found)
    module = site.module(tiny_pipe).get_submodule("out_proj" if site.component == "self_attention" else "fc2")
    keys = record(tiny_pipe, module, found.prompts, "input")
    torch.testing.assert_close(known.keys, gather(keys, found.source), rtol=0, atol=1e-6)
    bias = torch.linspace(-1, 1, len(module.bias))
    with torch.no_grad():
        module.bias += bias  # random models start with a bias of zero, which would prove nothing
        outputs = record(tiny_pipe, module, found.prompts, "output") - module.bias
        again = associate(tiny_pipe, site, found)
        module.bias -= bias
    torch.testing.assert_close(again.values, gather(outputs, found.target), rtol=0, atol=1e-5)
    n_edited = found.n_edited
    residuals = gather(outputs, found.target)[:n_edited] - gather(outputs, found.source)[:n_edited]
    torch.testing.assert_close(again.residuals, residuals, rtol=0, atol=1e-5)


def test_keys_of_padding_are_those_of_the_token_that_the_pipeline_pads_with():
    pipe = tiny.stable_diffusion_2()  # which pads with "!", not with the end token
    (site,) = sites(pipe, name="text_encoder.0.self_attention")
    found = pairs_of(pipe, {"ink": "noto"}, "from_subject")
    known = associate(pipe, site, found)
    assert len(known.keys) > 60, "the window's padding is among the tokens"
    keys = record(pipe, site.module(pipe).out_proj, found.prompts, "input")
    torch.testing.assert_close(known.keys, gather(keys, found.source), rtol=0, atol=1e-6)
    pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
    assert not torch.allclose(associate(pipe, site, found).keys[-1], known.keys[-1], atol=1e-4)


def test_nothing_behind_the_projection_is_computed(tiny_pipe):
    (site,) = sites(tiny_pipe, name="text_encoder.0.self_attention")
    ran = []
    layers = site.module(tiny_pipe).get_submodule("out_proj"), sites(tiny_pipe, name="*.0.mlp")[0].module(tiny_pipe)
    handles = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in layers]
    associate(tiny_pipe, site, pairs_of(tiny_pipe, {"ink": "noto"}))
    for handle in handles:
        handle.remove()
    assert not ran


def test_tokens_that_no_wanted_one_reads_are_left_out(tiny_pipe, monkeypatch):
    (site,) = sites(tiny_pipe, name="text_encoder.1.mlp")
    found = pairs_of(tiny_pipe, {"ink": "noto", "a cat": "bird"}, templates=None)
    table, n_tokens = tiny_pipe.text_encoder.get_input_embeddings(), []
    handle = table.register_forward_hook(lambda _, __, output: n_tokens.append(output.shape[1]))
    cut = associate(tiny_pipe, site, found)
    monkeypatch.setattr(StableDiffusion, "causal_text_encoders", ())
    whole = associate(tiny_pipe, site, found)
    handle.remove()
    assert n_tokens == [8, 77], "A photo of n-o-t-o: its last token is number 7"
    torch.testing.assert_close(cut.keys, whole.keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(cut.residuals, whole.residuals, rtol=0, atol=1e-6)


def test_no_token_of_a_causal_encoder_reads_a_later_one(tiny_pipe):
    """What the fact about the family means, in the encoder itself."""
    assert type(tiny_pipe.text_encoder).__name__ in StableDiffusion.causal_text_encoders
    ids = tiny_pipe.tokenizer(["a photo of ink in red", "a photo of cat"], padding=True, return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = tiny_pipe.text_encoder(ids).last_hidden_state
    assert torch.equal(first[:4], second[:4])
    assert not torch.allclose(first[4:], second[4:], atol=1e-3)


def test_a_site_without_a_projection_of_its_own_is_refused(tiny_pipe):
    for site in (
        sites(tiny_pipe, network="text_encoder", component="block")[0],
        sites(tiny_pipe, network="text_encoder", heads=True)[0],
    ):
        with pytest.raises(ValueError, match=r"no output projection of its own: edit a whole self_attention or mlp"):
            projection(tiny_pipe, site)


def test_padding_is_masked_where_the_pipeline_masks_it():
    pipe = tiny.stable_diffusion(text_encoder={"use_attention_mask": True})
    (site,) = sites(pipe, name="text_encoder.1.self_attention")
    found = pairs_of(pipe, {"ink": "noto"}, "from_subject")
    masked = associate(pipe, site, found).keys
    module = site.module(pipe).out_proj
    expected = gather(record(pipe, module, found.prompts, "input"), found.source)
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-6)
    pipe.text_encoder.config.use_attention_mask = False
    assert not torch.allclose(associate(pipe, site, found).keys, masked, atol=1e-3)


def test_many_prompts_are_read_in_chunks(tiny_pipe, monkeypatch):
    (site,) = sites(tiny_pipe, name="text_encoder.0.mlp")
    found = pairs_of(tiny_pipe, {"ink": "noto", "cat": "noto"}, templates=None, preserve=["dog", "bird"])
    whole = associate(tiny_pipe, site, found)
    monkeypatch.setattr(associations, "_CHUNK", 3)
    chunked = associate(tiny_pipe, site, found)
    torch.testing.assert_close(chunked.keys, whole.keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(chunked.values, whole.values, rtol=0, atol=1e-5)


def test_textual_inversion_tokens_are_spelled_out_as_the_pipeline_does(fresh_pipe):
    pipe = fresh_pipe
    pipe.tokenizer.add_tokens(["<ink>", "<ink>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    found = pairs_of(pipe, {"<ink>": "cat"}, templates=("a photo of {}",))
    assert positions(found) == [(5, 4)], "the concept stands for two vectors, at 4 and 5"
    (site,) = sites(pipe, name="text_encoder.0.self_attention")
    expected = record(pipe, site.module(pipe).out_proj, ["a photo of <ink>"], "input")[0, 5]
    torch.testing.assert_close(associate(pipe, site, found).keys[0], expected, rtol=0, atol=1e-6)


def test_the_encoder_is_read_wherever_other_networks_are(tiny_pipe, monkeypatch):
    (site,) = sites(tiny_pipe, name="text_encoder.1.self_attention")
    found = pairs_of(tiny_pipe, {"ink": "noto"}, templates=None)
    expected = associate(tiny_pipe, site, found).keys
    # The pipeline's own answer is the accelerator that any network is on, after a look at every module of all.
    monkeypatch.setattr(type(tiny_pipe), "_execution_device", property(lambda _: torch.device("meta")))
    assert torch.equal(associate(tiny_pipe, site, found).keys, expected)


def test_an_encoder_that_is_offloaded_as_a_whole_is_read_where_it_runs(fresh_pipe):
    """As `enable_model_cpu_offload` does; of an encoder offloaded layer by layer there is nothing to read."""
    (site,) = sites(fresh_pipe, name="text_encoder.1.self_attention")
    found = pairs_of(fresh_pipe, {"ink": "noto"}, templates=None)
    expected = associate(fresh_pipe, site, found)
    pytest.importorskip("accelerate").cpu_offload_with_hook(fresh_pipe.text_encoder, torch.device("cpu"))
    known = associate(fresh_pipe, site, found)
    assert torch.equal(known.keys, expected.keys)
    assert torch.equal(known.residuals, expected.residuals)
    fresh_pipe.text_encoder.to("meta")
    with pytest.raises(ValueError, match="is offloaded: edit the pipeline before offloading it"):
        associate(fresh_pipe, site, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_weights_are_finite_and_infinities_do_not_cancel(dtype):
    weight = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(weight.double(), dtype)
    for values in ((torch.inf, -torch.inf), (torch.nan, 0.0), (-torch.inf, 1.0)):
        weight[3, 5], weight[7, 0] = values
        assert not all_finite(weight.double(), dtype)
