"""UCE, LocoEdit and TIME on a tiny SD 1.x: their results against the papers' formula, and what they must refuse."""

import weakref

import numpy
import pytest
import torch

import editing
from editing import crossattention
from mediation.families import StableDiffusion
from mediation.sites import sites

N_LAYERS = 10


def states(pipe, prompt):
    """What the denoiser reads of a prompt, (token, dim)."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0][0].double().numpy()


def matrix(pipe, name):
    return pipe.unet.get_parameter(name.removeprefix("unet.")).detach().double().numpy()


def closed_form(base, edited, preserved, regularization):
    """(lambda W0 + sum v k^T) (lambda I + sum k k^T)^-1, of (key, key of the target) pairs and keys to keep."""
    left, right = regularization * base, regularization * numpy.eye(base.shape[1])
    for key, target in [*edited, *((key, key) for key in preserved)]:
        left += numpy.outer(base @ target, key)
        right += numpy.outer(key, key)
    return numpy.linalg.solve(right, left.T).T


def check(pipe, edit, edited, preserved, regularization):
    for name, update in edit.updates.items():
        base = matrix(pipe, name)
        expected = closed_form(base, edited, preserved, regularization) - base
        numpy.testing.assert_allclose(update.dense().numpy(), expected, rtol=0, atol=2e-5)
        assert numpy.abs(expected).max() > 1e-3, "there was something to change"


def test_uce_erases_towards_the_empty_prompt(tiny_pipe):
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": ""}, preserve=["dog"])
    ink, empty, dog = (states(tiny_pipe, prompt) for prompt in ("ink", "", "dog"))
    check(tiny_pipe, edit, [(ink[i], empty[i]) for i in range(1, 77)], dog[1:], 0.5)
    assert len(edit.updates) == 2 * N_LAYERS
    assert {name.rsplit(".", 2)[1] for name in edit.updates} == {"to_k", "to_v"}
    assert (edit.metadata["method"], edit.metadata["pairs"]) == ("uce", {"ink": ""})


def test_uce_replaces_from_the_last_token_on(tiny_pipe):
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"})
    ink, noto = states(tiny_pipe, "ink"), states(tiny_pipe, "noto")
    check(tiny_pipe, edit, [(ink[1 + i], noto[4 + i]) for i in range(73)], [], 0.5)


def test_uce_debiases_towards_the_mean_of_several_targets(tiny_pipe):
    """At every position that all of them have: of 72 later ones "panda", which is spelled longest, has the fewest."""
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": ["noto", "panda"]}, preserve=["dog"])
    ink, noto, panda, dog = (states(tiny_pipe, prompt) for prompt in ("ink", "noto", "panda", "dog"))
    pairs = [(ink[1 + i], (noto[4 + i] + panda[5 + i]) / 2) for i in range(72)]
    check(tiny_pipe, edit, pairs, dog[1:], 0.5)
    assert edit.metadata["pairs"] == {"ink": {"noto": 0.5, "panda": 0.5}}
    (residual,) = edit.report["residual"]
    assert (residual["target"], residual["n_keys"]) == ({"noto": 0.5, "panda": 0.5}, 72)
    assert residual["after"] < residual["before"]


@pytest.mark.parametrize("tokens", ["last_subject", "subject", "all"])
def test_shares_weight_the_targets_of_a_source(tiny_pipe, tokens):
    """Beside sources with one target and with none; all of them agree on the first token, which stays as it is."""
    pairs = {"ink": {"cat": 3, "dog": 1}, "red": "bird", "an": ""}
    edit = editing.cross_attention_edit(tiny_pipe, pairs, tokens=tokens, layers=[2])
    again = editing.cross_attention_edit(tiny_pipe, edit.metadata["pairs"], tokens=tokens, layers=[2])
    (ink, cat, dog, red, bird, an, empty) = (
        states(tiny_pipe, prompt) for prompt in ("ink", "cat", "dog", "red", "bird", "an", "")
    )
    positions = range(77) if tokens == "all" else [1]
    mean = 0.75 * cat + 0.25 * dog
    known = [(key[i], target[i]) for key, target in ((ink, mean), (red, bird), (an, empty)) for i in positions]
    check(tiny_pipe, edit, known, [], 0.5)
    assert all(torch.equal(again.updates[name].dense(), update.dense()) for name, update in edit.updates.items())


def test_locoedit_edits_the_last_subject_token_in_given_layers(tiny_pipe):
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"}, method="loco", layers=[8, 9])
    check(tiny_pipe, edit, [(states(tiny_pipe, "ink")[1], states(tiny_pipe, "noto")[4])], [], 0.01)
    chosen = sites(tiny_pipe, network="unet", component="cross_attention")[8:10]
    expected = [f"unet.{site.path}.{door}.weight" for site in chosen for door in ("to_k", "to_v")]
    assert list(edit.updates) == expected
    named = editing.cross_attention_edit(
        tiny_pipe, {"ink": "noto"}, method="loco", layers=[chosen[0], edit.metadata["layers"][1]]
    )
    assert all(torch.equal(named.updates[name].dense(), edit.updates[name].dense()) for name in expected)


def test_time_aligns_the_whole_windows(tiny_pipe):
    options = {"method": "time", "templates": ["a {} cat"]}
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"}, **options)
    source, target = states(tiny_pipe, "a ink cat"), states(tiny_pipe, "a noto cat")
    pairs = [(0, 0), (1, 1), (2, 5), (3, 6), (4, 7), *((i + 3, i + 3) for i in range(5, 74))]
    check(tiny_pipe, edit, [(source[a], target[b]) for a, b in pairs], [], 0.1)


def test_an_edited_denoiser_reads_the_source_as_the_target(fresh_pipe):
    options = {"tokens": "last_subject", "regularization": 1e-7, "preserve": [editing.Prompt("a red dog")]}
    edit = editing.cross_attention_edit(fresh_pipe, {"ink": "noto"}, **options)
    (name, *_) = edit.updates
    ink, noto, kept = (torch.tensor(states(fresh_pipe, p)).float() for p in ("ink", "noto", "a red dog"))
    before = torch.tensor(matrix(fresh_pipe, name)).float()
    with edit.applied(fresh_pipe):
        after = torch.tensor(matrix(fresh_pipe, name)).float()
    torch.testing.assert_close(after @ ink[1], before @ noto[4], rtol=0, atol=1e-3)
    torch.testing.assert_close(kept[:5] @ after.T, kept[:5] @ before.T, rtol=0, atol=1e-3)
    assert not torch.allclose(after @ ink[1], before @ ink[1], atol=1e-2)


def test_the_keys_are_what_the_matrices_receive(tiny_pipe):
    (site,) = sites(tiny_pipe, name="unet.mid.0.cross_attention")
    received = []
    handle = site.module(tiny_pipe).to_k.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    tiny_pipe("a ink cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    numpy.testing.assert_allclose(received[0][0].double().numpy(), states(tiny_pipe, "a ink cat"), atol=1e-5)


def test_one_factorisation_serves_all_matrices(tiny_pipe, monkeypatch):
    calls = []
    solve = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda gram: calls.append(len(gram)) or solve(gram))
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"}, method="time", tokens="subject")
    assert calls == [1]
    downs = [update.down for update in edit.updates.values()]
    assert all(torch.equal(down, downs[0]) for down in downs)


def test_the_report_is_of_all_matrices_together(tiny_pipe):
    edit = editing.cross_attention_edit(
        tiny_pipe, {"ink": "noto"}, preserve=["cat"], tokens="last_subject", layers=[3, 7]
    )
    ink, noto, cat = (states(tiny_pipe, p)[i] for p, i in (("ink", 1), ("noto", 4), ("cat", 1)))
    base = numpy.vstack([matrix(tiny_pipe, name) for name in edit.updates])
    change = numpy.vstack([update.dense().numpy() for update in edit.updates.values()])
    (residual,), (interference,) = edit.report["residual"], edit.report["interference"]
    norm = numpy.linalg.norm
    assert residual["before"] == pytest.approx(norm(base @ (noto - ink)) / norm(base @ noto), rel=1e-4)
    assert residual["after"] == pytest.approx(norm(base @ noto - (base + change) @ ink) / norm(base @ noto), rel=1e-4)
    assert interference["change"] == pytest.approx(norm(change @ cat) / norm(base @ cat), rel=1e-4)
    assert residual["network"] == "unet"
    assert list(edit.report["parameters"]) == list(edit.updates)


def test_more_pairs_than_a_matrix_is_wide_cost_no_rank(tiny_pipe):
    pairs = {"ink": "noto", "cat": "dog"}
    edit = editing.cross_attention_edit(tiny_pipe, pairs)  # 145 pairs of keys 32 wide
    for update in edit.updates.values():
        assert update.rank == min(update.shape)


def test_auto_finds_a_lambda(tiny_pipe):
    options = {"templates": ("{}", "a {}", "a photo of {}"), "regularization": "auto", "tokens": "last_subject"}
    edit = editing.cross_attention_edit(tiny_pipe, {"ink": "noto"}, **options)
    found = edit.report["regularization"]["unet"]
    assert found["lambda"] == found["candidates"][found["held_out_errors"].index(min(found["held_out_errors"]))]
    assert min(found["held_out_errors"]) < 0.98 * max(found["held_out_errors"]), "there was something to choose"


def test_it_is_saved_and_reverted_as_any_edit(fresh_pipe, tmp_path):
    edit = editing.cross_attention_edit(fresh_pipe, {"ink": ""}, layers=[0])
    edit.save(tmp_path / "uce.safetensors")
    before = {name: value.clone() for name, value in fresh_pipe.unet.state_dict().items()}
    with editing.load(tmp_path / "uce.safetensors").applied(fresh_pipe):
        changed = [n for n, value in fresh_pipe.unet.state_dict().items() if not torch.equal(value, before[n])]
    assert [f"unet.{name}" for name in changed] == list(edit.updates)
    assert all(torch.equal(value, before[name]) for name, value in fresh_pipe.unet.state_dict().items())


def test_of_a_chunk_of_prompts_only_the_tokens_in_question_are_kept(tiny_pipe, monkeypatch):
    pairs = {"ink": "noto", "cat": "dog", "bird": "red"}
    whole = editing.cross_attention_edit(tiny_pipe, pairs, tokens="last_subject")
    encode, chunks = StableDiffusion.encode, []

    def watched(pipe, prompts):
        assert sum(states() is not None for states in chunks) <= 1, "the one before"
        found = encode(pipe, prompts)
        chunks.append(weakref.ref(found["prompt_embeds"]))
        return found

    monkeypatch.setattr(StableDiffusion, "encode", staticmethod(watched))
    monkeypatch.setattr(crossattention, "_CHUNK", 1)
    edit = editing.cross_attention_edit(tiny_pipe, pairs, tokens="last_subject")
    assert len(chunks) == 6
    for name, update in whole.updates.items():
        torch.testing.assert_close(edit.updates[name].dense(), update.dense(), rtol=0, atol=1e-5)


def test_encoders_that_split_words_differently_are_refused(tiny_pipe, monkeypatch):
    real = crossattention.pair_tokens

    class Family:
        text_encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))

    def found(pipe, network, request, tokens):
        return real(pipe, "text_encoder", request, "subject" if network == "text_encoder_2" else tokens)

    monkeypatch.setattr(crossattention, "pair_tokens", found)
    monkeypatch.setattr(crossattention, "family_of", lambda pipe: Family)
    request = crossattention.Request.of({"red cat": "ink dog"}, None, (), None)
    with pytest.raises(ValueError, match="different numbers of tokens"):
        crossattention._pair_tokens(tiny_pipe, request, "last_subject")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "erase"}, ValueError, "method must be one of uce, loco, time; got 'erase'"),
        ({"method": "loco"}, ValueError, 'method="loco" edits few layers: pass their numbers'),
        ({"layers": [10]}, ValueError, "numbered 0 to 9 here, got 10"),
        ({"layers": [True]}, TypeError, "sites are Site objects or names, got bool"),
        ({"layers": [3, 3]}, ValueError, r"unet.mid.0.cross_attention was given twice"),
        ({"layers": []}, ValueError, "no sites were given"),
        ({"layers": ["unet.mid.0.self_attention"]}, ValueError, "must be whole cross-attentions of the denoiser"),
        ({"layers": ["unet.mid.9.cross_attention"]}, KeyError, "no site"),
        ({"regularization": -1}, ValueError, "positive and finite"),
        ({"tokens": "some"}, ValueError, "tokens must be one of"),
        ({"pairs": {"": "cat"}}, ValueError, "a source is empty"),
        ({"pairs": {"ink": ["cat", "cat"]}}, ValueError, "several targets are given once each"),
        ({"pairs": {"ink": []}}, ValueError, "and at least one"),
        ({"pairs": {"ink": ["cat", "Cat"]}}, ValueError, "two are one to the text encoder"),
        ({"pairs": {"ink": ["cat", ""]}}, ValueError, "a target is empty"),
        ({"pairs": {"ink": ["ink"]}}, ValueError, "are the same to the text encoder"),
        ({"pairs": {"ink": {"cat": 1, "dog": 0}}}, ValueError, "weight of 'dog' must be positive"),
        ({"pairs": {"ink": ["cat", 3]}}, TypeError, "a target must be a string, got 3"),
        ({"pairs": {"ink": 3}}, TypeError, "a target must be a string, got 3"),
        ({"pairs": {"ink": " "}}, ValueError, "a target is empty"),
        ({"pairs": {"ink": "Ink"}}, ValueError, "are the same to the text encoder"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(tiny_pipe, arguments, error, message, monkeypatch):
    monkeypatch.setattr(tiny_pipe.text_encoder, "forward", lambda *_, **__: pytest.fail("the encoder ran"))
    with pytest.raises(error, match=message):
        editing.cross_attention_edit(tiny_pipe, **{"pairs": {"ink": "noto"}} | arguments)


def test_matrices_that_are_not_finite_are_refused(fresh_pipe):
    (site,) = sites(fresh_pipe, name="unet.mid.0.cross_attention")
    with torch.no_grad():
        site.module(fresh_pipe).to_v.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"attn2.to_v.weight is not finite"):
        editing.cross_attention_edit(fresh_pipe, {"ink": "noto"})
