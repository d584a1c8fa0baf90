"""Diff-QuickFix on a tiny SD 1.x: its result against the paper's formula, and everything it must refuse."""

import contextlib
import copy
import importlib.metadata
import json
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import editing
from mediation.families import StableDiffusion
from mediation.sites import sites
from tests import tiny

CONCEPTS = ("ink", "noto", "cat", "a red dog", "bird", "panda")
THREE = [("ink", "noto"), ("cat", "bird"), ("panda", "dog")]


def only(records):
    """What an edit of one parameter has of it."""
    (record,) = records.values()
    return record


def out_proj(pipe, layer=0):
    return sites(pipe, network="text_encoder", component="self_attention", layer=layer)[0].module(pipe).out_proj


def run(pipe, prompt, module):
    """Input and output of a module, (token, dim), in a full encoding of the prompt."""
    seen = {}
    handle = module.register_forward_hook(lambda _, args, output: seen.update(input=args[0][0], output=output[0]))
    with torch.no_grad():
        pipe.encode_prompt(prompt, "cpu", 1, False)
    handle.remove()
    return seen["input"].double(), seen["output"].double()


def state(pipe):
    return {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}


def test_it_is_the_papers_formula(sd_pipe):
    """W* = (lambda W0 + sum w v k^T) (lambda I + sum w k k^T)^-1, with positions counted by hand."""
    edit = editing.quickfix(
        sd_pipe,
        {"ink": "noto"},
        templates=["{}", "a {} cat"],
        preserve=["dog"],
        weights={"ink": 2},
        regularization=0.3,
    )
    module = out_proj(sd_pipe)
    base = module.weight.detach().double().numpy()
    left, right = 0.3 * base, 0.3 * numpy.eye(32)
    for weight, source, target in [
        (2, ("ink", 1), ("noto", 4)),
        (2, ("a ink cat", 2), ("a noto cat", 5)),
        (1, ("dog", 1), ("dog", 1)),
        (1, ("a dog cat", 2), ("a dog cat", 2)),
    ]:
        key, other = (run(sd_pipe, prompt, module)[0][position].numpy() for prompt, position in (source, target))
        left += weight * numpy.outer(base @ other, key)
        right += weight * numpy.outer(key, key)
    expected = numpy.linalg.solve(right, left.T).T
    found = base + only(edit.updates).dense().numpy()
    numpy.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert numpy.abs(expected - base).max() > 0.1, "there was something to change"


def test_the_bias_is_counted_once(fresh_pipe):
    """As lambda vanishes the layer answers to the source as it did to the target, its bias included."""
    module = out_proj(fresh_pipe)
    with torch.no_grad():
        module.bias += torch.linspace(-3, 3, 32)
    prompts = [("ink", 1, "noto", 4), ("A photo of ink", 4, "A photo of noto", 7)]
    wanted = [run(fresh_pipe, target, module)[1][last] for _, _, target, last in prompts]
    edit = editing.quickfix(fresh_pipe, {"ink": "noto"}, regularization=1e-7)
    with edit.applied(fresh_pipe):
        for (source, last, _, _), expected in zip(prompts, wanted, strict=True):
            torch.testing.assert_close(run(fresh_pipe, source, module)[1][last], expected, rtol=0, atol=1e-3)


def test_strong_regularization_changes_nothing(tiny_pipe):
    weak, strong = (
        only(editing.quickfix(tiny_pipe, {"ink": "noto"}, regularization=strength).report["parameters"])
        for strength in (0.01, 1e9)
    )
    assert weak["relative_norm"] > 0.1
    assert strong["relative_norm"] < 1e-8


@pytest.fixture(scope="module")
def straight(tiny_pipe):
    """The edit of three concepts in the order in which they are written, by tokens."""
    return {
        kind: editing.quickfix(tiny_pipe, dict(THREE), preserve=["red", "a photo"], tokens=kind)
        for kind in ("subject", "from_subject")
    }


@given(
    order=st.permutations(range(3)), kept=st.permutations(range(2)), kind=st.sampled_from(["subject", "from_subject"])
)
def test_the_order_of_concepts_does_not_matter(tiny_pipe, straight, order, kept, kind):
    preserve = ["red", "a photo"]
    shuffled = editing.quickfix(
        tiny_pipe, dict(THREE[i] for i in order), preserve=[preserve[i] for i in kept], tokens=kind
    )
    expected = only(straight[kind].updates).dense()
    torch.testing.assert_close(only(shuffled.updates).dense(), expected, rtol=0, atol=1e-4)


def test_weights_and_regularization_share_a_unit(tiny_pipe):
    options = {"preserve": ["cat"], "templates": ["{}", "a {}"]}
    light = editing.quickfix(tiny_pipe, {"ink": "noto"}, regularization=0.1, **options)
    heavy = editing.quickfix(tiny_pipe, {"ink": "noto"}, regularization=0.4, weights={"ink": 4, "cat": 4}, **options)
    torch.testing.assert_close(only(light.updates).dense(), only(heavy.updates).dense(), rtol=0, atol=1e-5)


@given(n_edited=st.integers(1, 3), n_templates=st.integers(1, 4), n_preserved=st.integers(0, 3))
def test_the_rank_counts_edited_keys_only(tiny_pipe, n_edited, n_templates, n_preserved):
    pairs = dict.fromkeys(CONCEPTS[:n_edited], "photo")
    templates, preserve = editing.concepts.TEMPLATES[:n_templates], CONCEPTS[3 : 3 + n_preserved]
    edit = editing.quickfix(tiny_pipe, pairs, templates=templates, preserve=preserve)
    assert only(edit.updates).rank == only(edit.report["parameters"])["rank"] == n_edited * n_templates
    assert numpy.linalg.matrix_rank(only(edit.updates).dense(), tol=1e-5) <= n_edited * n_templates


def test_the_report_tells_what_the_edited_pipeline_does(fresh_pipe):
    started = time.perf_counter()
    edit = editing.quickfix(fresh_pipe, {"ink": "noto"}, templates=["{}"], preserve=["cat"], regularization=0.5)
    elapsed = time.perf_counter() - started
    module = out_proj(fresh_pipe)  # of a random model: its bias is zero
    target, source = (run(fresh_pipe, prompt, module)[1][last] for prompt, last in (("noto", 4), ("ink", 1)))
    kept = run(fresh_pipe, "cat", module)[1][1]
    with edit.applied(fresh_pipe):
        edited, moved = (run(fresh_pipe, prompt, module)[1][1] for prompt in ("ink", "cat"))
    (residual,), (interference,) = edit.report["residual"], edit.report["interference"]
    assert (residual["source"], residual["target"], residual["n_keys"]) == ("ink", "noto", 1)
    assert residual["before"] == pytest.approx(float((source - target).norm() / target.norm()), rel=1e-4)
    assert residual["after"] == pytest.approx(float((edited - target).norm() / target.norm()), rel=1e-4)
    assert interference["concept"] == "cat"
    assert interference["change"] == pytest.approx(float((moved - kept).norm() / kept.norm()), rel=1e-4)
    dense = only(edit.updates).dense()
    measures = only(edit.report["parameters"])
    assert measures["norm"] == pytest.approx(float(dense.norm()), rel=1e-6)
    assert measures["relative_norm"] == pytest.approx(
        float(dense.norm() / module.weight.detach().double().norm()), rel=1e-6
    )
    stages = edit.report["milliseconds"]
    assert list(stages) == ["tokens", "keys", "solve", "report"]
    assert 0 < sum(stages.values()) <= 1000 * elapsed


def test_preserving_a_concept_keeps_its_values(tiny_pipe):
    module = out_proj(tiny_pipe)
    key = run(tiny_pipe, "A photo of dog", module)[0][4:5]
    plain = editing.quickfix(tiny_pipe, {"ink": "noto"})
    kept = editing.quickfix(tiny_pipe, {"ink": "noto"}, preserve=["dog"], weights={"dog": 1e4})
    moved = [float(only(edit.updates).times(key).norm()) for edit in (plain, kept)]
    assert moved[1] < 1e-2 * moved[0]


def test_preserving_a_prompt_keeps_the_values_of_its_words(tiny_pipe):
    module = out_proj(tiny_pipe)
    keys = run(tiny_pipe, "the cat of red ink", module)[0][:7]  # the word itself, "ink", elsewhere than in templates
    plain = editing.quickfix(tiny_pipe, {"ink": "noto"})
    kept = editing.quickfix(tiny_pipe, {"ink": "noto"}, preserve=[editing.Prompt("the cat of red ink", weight=1e4)])
    moved = [float(only(edit.updates).times(keys).norm()) for edit in (plain, kept)]
    assert moved[1] < 1e-2 * moved[0]
    (entry,) = kept.report["interference"]
    values = keys @ module.weight.detach().double().T
    assert entry["prompt"] == "the cat of red ink"
    assert entry["n_keys"] == 7
    assert entry["change"] == pytest.approx(moved[1] / float(values.norm()), rel=0.01)


def test_a_target_can_be_preserved(tiny_pipe):
    edit = editing.quickfix(tiny_pipe, {"ink": "noto"}, preserve=["noto"])
    plain = editing.quickfix(tiny_pipe, {"ink": "noto"})
    key = run(tiny_pipe, "noto", out_proj(tiny_pipe))[0][4:5]
    assert only(edit.updates).times(key).norm() < only(plain.updates).times(key).norm()
    assert edit.report["residual"][0]["after"] < 0.5


def test_two_layers_are_edited_one_after_the_other_and_added(fresh_pipe):
    first = editing.quickfix(fresh_pipe, {"ink": "noto"}, templates=["{}"])
    module = out_proj(fresh_pipe, layer=1)
    with first.applied(fresh_pipe):
        wanted = run(fresh_pipe, "noto", module)[1][4]
        second = editing.quickfix(
            fresh_pipe,
            {"ink": "noto"},
            templates=["{}"],
            site="text_encoder.1.self_attention",
            regularization=1e-6,
        )
    with (first + second).applied(fresh_pipe):
        torch.testing.assert_close(run(fresh_pipe, "ink", module)[1][1], wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_sites_are_edited_in_the_order_in_which_they_run(fresh_pipe, dtype):
    """Each as if the ones before it were an edit of their own, applied while it is made."""
    pipe, options = fresh_pipe.to(dtype), {"preserve": ["cat"], "regularization": 0.1}
    names = ["text_encoder.0.self_attention", "text_encoder.1.self_attention", "text_encoder.1.mlp"]
    before, found = state(pipe), editing.quickfix(pipe, {"ink": "noto"}, site=[names[2], names[0], names[1]], **options)
    assert all(torch.equal(value, before[name]) for name, value in state(pipe).items()), "as it was"
    apart = []
    with contextlib.ExitStack() as applied:
        for name in names:
            apart.append(editing.quickfix(pipe, {"ink": "noto"}, site=name, **options))
            applied.enter_context(apart[-1].applied(pipe))
        expected = state(pipe)
    assert found.metadata["sites"] == names
    assert list(found.updates) == [name for edit in apart for name in edit.updates]
    for edit in apart:
        assert torch.equal(only(edit.updates).dense(), found.updates[next(iter(edit.updates))].dense())
    with found.applied(pipe):
        assert all(torch.equal(value, expected[name]) for name, value in state(pipe).items())
    for kind in ("residual", "interference"):
        assert [entry["site"] for entry in found.report[kind]] == names
        assert found.report[kind] == [entry for edit in apart for entry in edit.report[kind]]
    alone = editing.quickfix(pipe, {"ink": "noto"}, site=names[2], **options)
    assert not torch.allclose(only(alone.updates).dense(), only(apart[2].updates).dense(), atol=1e-3)


def test_what_earlier_sites_changed_is_put_back_if_a_later_one_fails(fresh_pipe):
    before = state(fresh_pipe)
    sites(fresh_pipe, name="text_encoder.1.mlp")[0].module(fresh_pipe).fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        editing.quickfix(fresh_pipe, PAIRS, site=["text_encoder.0.mlp", "text_encoder.1.mlp"])
    changed = [name for name, value in state(fresh_pipe).items() if not torch.equal(value, before[name])]
    assert [name.split("layers.")[1] for name in changed] == ["1.mlp.fc2.weight"]


def test_the_pipeline_is_only_read(tiny_pipe):
    before = state(tiny_pipe)
    editing.quickfix(tiny_pipe, {"ink": "noto"}, preserve=["cat"], tokens="from_subject")
    assert all(torch.equal(value, before[name]) for name, value in state(tiny_pipe).items())
    assert not any(module._forward_pre_hooks for module in tiny_pipe.text_encoder.modules())


@pytest.mark.parametrize(
    ("site", "parameter"),
    [
        ("text_encoder.1.mlp", "text_encoder.encoder.layers.1.mlp.fc2.weight"),
        ("text_encoder.2.self_attention", "text_encoder.encoder.layers.2.self_attn.out_proj.weight"),
    ],
)
def test_any_text_encoder_site_can_be_edited(fresh_pipe, site, parameter):
    edit = editing.quickfix(fresh_pipe, {"ink": "noto"}, site=site)
    before = state(fresh_pipe)
    edit.apply(fresh_pipe)
    changed = [name for name, value in state(fresh_pipe).items() if not torch.equal(value, before[name])]
    assert [f"text_encoder.{name}" for name in changed] == list(edit.updates)
    assert changed[0].replace("text_model.", "") == parameter.removeprefix("text_encoder.")
    assert edit.metadata["sites"] == [site]
    assert edit.report["residual"][0]["after"] < 0.5 * edit.report["residual"][0]["before"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_is_edited_as_well(fresh_pipe, dtype):
    single = editing.quickfix(fresh_pipe, {"ink": "noto"}, regularization=0.3)
    half = editing.quickfix(fresh_pipe.to(dtype), {"ink": "noto"}, regularization=0.3)
    difference = only(half.updates).dense() - only(single.updates).dense()
    assert difference.norm() < 0.1 * only(single.updates).norm()


def test_both_encoders_of_a_family_with_two_are_edited(fresh_pipe, monkeypatch):
    pipe = fresh_pipe
    pipe.text_encoder_2, pipe.tokenizer_2 = tiny.stable_diffusion(seed=1).text_encoder, tiny.tokenizer(("noto",))
    encoders = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    projections = StableDiffusion.output_projections
    monkeypatch.setattr(StableDiffusion, "text_encoders", encoders)
    monkeypatch.setattr(
        StableDiffusion, "output_projections", projections | {"text_encoder_2": projections["text_encoder"]}
    )
    edit = editing.quickfix(pipe, {"ink": "noto"}, templates=["{}"])
    first, second = edit.updates
    assert first.startswith("text_encoder.")
    assert second == first.replace("text_encoder", "text_encoder_2")
    assert [entry["network"] for entry in edit.report["residual"]] == ["text_encoder", "text_encoder_2"]
    # The second tokenizer knows "noto" as one token, and spells "ink".
    encoder = pipe.text_encoder_2
    monkeypatch.setattr(pipe, "text_encoder", encoder)
    monkeypatch.setattr(pipe, "tokenizer", pipe.tokenizer_2)
    alone = editing.quickfix(pipe, {"ink": "noto"}, templates=["{}"], site="text_encoder.0.self_attention")
    assert torch.equal(only(alone.updates).dense(), list(edit.updates.values())[1].dense())


def test_metadata_is_plain_json_and_enough_to_make_the_edit_again(tiny_pipe):
    edit = editing.quickfix(
        tiny_pipe,
        {" ink ": "noto"},
        preserve=("cat", editing.Prompt("a red dog", weight=0.5)),
        templates=("{}", "a {}"),
        weights={"cat": 2},
        tokens="subject",
    )
    metadata = json.loads(json.dumps(dict(edit.metadata)))
    assert metadata == dict(edit.metadata)
    assert metadata["versions"]["torch"] == importlib.metadata.version("torch")
    assert metadata["pipeline"]["class"] == "StableDiffusionPipeline"
    arguments = {key: metadata[key] for key in ("pairs", "templates", "regularization", "tokens", "weights")}
    prompts = [editing.Prompt(text, weight) for text, weight in metadata["preserve_prompts"].items()]
    again = editing.quickfix(tiny_pipe, **arguments, preserve=[*metadata["preserve"], *prompts], site=metadata["sites"])
    assert torch.equal(only(again.updates).dense(), only(edit.updates).dense())


PAIRS = {"ink": "noto"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pairs": {"ink": "ink"}}, ValueError, "source 'ink' and target 'ink' are the same"),
        ({"pairs": {"ink": " INK "}}, ValueError, "are the same to the text encoder"),
        ({"pairs": {}}, ValueError, "no concept to edit"),
        ({"pairs": {"": "noto"}}, ValueError, "a source is empty"),
        ({"pairs": {"ink": "  "}}, ValueError, "a target is empty"),
        ({"pairs": {"ink": "noto", "Ink": "cat"}}, ValueError, "'ink' and 'Ink' are one concept"),
        ({"pairs": {"ink": "noto", " ink": "cat"}}, ValueError, "given twice"),
        ({"pairs": {"ink": 3}}, TypeError, "a target must be a string, got 3"),
        ({"pairs": {"ink": ["noto", "cat"]}}, TypeError, "a target must be a string"),
        ({"pairs": "ink"}, TypeError, "pairs must be a mapping"),
        ({"preserve": ["Ink"]}, ValueError, "'Ink' would be edited and preserved"),
        ({"preserve": ["cat", "cat"]}, ValueError, "'cat' would be preserved twice"),
        ({"preserve": [""]}, ValueError, "a preserved concept is empty"),
        ({"preserve": "cat"}, TypeError, "preserve must be a list of strings"),
        ({"templates": "a {}"}, TypeError, "templates must be a list of strings"),
        ({"templates": [3]}, TypeError, "a template must be a string, got 3"),
        ({"templates": []}, ValueError, "no template"),
        ({"templates": ["a photo"]}, ValueError, "exactly one \"{}\".*got 'a photo'"),
        ({"templates": ["{} and {}"]}, ValueError, 'exactly one "{}"'),
        ({"templates": ["{0}"]}, ValueError, 'exactly one "{}"'),
        ({"templates": ["{}", "{}"]}, ValueError, "given twice"),
        ({"templates": ["a " * 80 + "{}"]}, ValueError, "the subject 'ink' is truncated"),
        ({"pairs": {"ink": "noto " * 30}}, ValueError, "is truncated"),
        ({"regularization": 0}, ValueError, "regularization must be positive"),
        ({"regularization": float("nan")}, ValueError, "regularization must be positive and finite"),
        ({"regularization": "automatic"}, TypeError, "regularization must be a number"),
        (
            {"tokens": "every"},
            ValueError,
            "tokens must be one of last_subject, subject, from_subject, all; got 'every'",
        ),
        ({"weights": {"dog": 1.0}}, ValueError, "'dog', which is neither"),
        ({"weights": {"ink": 0}}, ValueError, "weight of 'ink' must be positive"),
        ({"weights": {"ink": "2"}}, TypeError, "weight of 'ink' must be a number, got '2'"),
        ({"weights": [1.0]}, TypeError, "weights must be a mapping"),
        ({"site": "unet.mid.0.self_attention"}, ValueError, "edits text encoders"),
        ({"site": "text_encoder.9.mlp"}, KeyError, "no site 'text_encoder.9.mlp'"),
        ({"site": ["text_encoder.0.mlp", "text_encoder.0.mlp"]}, ValueError, "text_encoder.0.mlp was given twice"),
        ({"site": "text_encoder.0.self_attention.head.0"}, ValueError, "no output projection of its own"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(tiny_pipe, arguments, error, message, monkeypatch):
    monkeypatch.setattr(tiny_pipe.text_encoder, "forward", lambda *_, **__: pytest.fail("the encoder ran"))
    with pytest.raises(error, match=message):
        editing.quickfix(tiny_pipe, **{"pairs": PAIRS} | arguments)


def test_weights_that_are_not_finite_are_refused(fresh_pipe):
    with torch.no_grad():
        out_proj(fresh_pipe).weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weights at text_encoder.0.self_attention are not finite"):
        editing.quickfix(fresh_pipe, PAIRS)
    with pytest.raises(ValueError, match=r"not finite before text_encoder.1.mlp"):
        editing.quickfix(fresh_pipe, PAIRS, site="text_encoder.1.mlp")


def test_a_projection_that_is_not_plain_is_refused(fresh_pipe):
    class Adapted(nn.Linear):
        pass

    attention = sites(fresh_pipe, name="text_encoder.0.self_attention")[0].module(fresh_pipe)
    attention.out_proj = Adapted(32, 32)
    with pytest.raises(ValueError, match=r"Adapted, not a linear layer.*adapters"):
        editing.quickfix(fresh_pipe, PAIRS)
    attention.out_proj = nn.Linear(32, 32, device="meta")
    with pytest.raises(ValueError, match="is offloaded"):
        editing.quickfix(fresh_pipe, PAIRS)


def test_only_pipelines_are_edited(tiny_pipe):
    with pytest.raises(TypeError, match="expected a diffusers pipeline, got CLIPTextModel"):
        editing.quickfix(copy.copy(tiny_pipe.text_encoder), PAIRS)
