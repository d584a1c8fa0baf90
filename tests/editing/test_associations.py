"""Token pairs against positions counted by hand; keys and values against a full run of the pipeline's own encoder."""

import pytest
import torch

from editing import associations
from editing.associations import associate, pair_tokens
from editing.concepts import Request
from mediation.sites import sites
from tests import tiny

# In the tiny vocabulary "ink", "cat" and the templates' words take one token each, other words one per letter.


def pairs_of(pipe, pairs, tokens="last_subject", templates=("{}",), preserve=(), weights=None, network="text_encoder"):
    return pair_tokens(pipe, network, Request.of(pairs, templates, preserve, weights), tokens)


def positions(found):
    """(source position, target position) of every pair."""
    return list(zip(found.source[:, 1].tolist(), found.target[:, 1].tolist(), strict=True))


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


def test_last_tokens_meet_in_each_of_the_papers_templates(tiny_pipe):
    found = pairs_of(tiny_pipe, {"ink": "noto"}, templates=None)
    assert found.prompts[:4] == ["ink", "noto", "A photo of ink", "A photo of noto"]
    assert positions(found) == [(1, 4), (4, 7), (4, 7), (4, 7)]
    assert found.source[:, 0].tolist() == [0, 2, 4, 6]
    assert found.target[:, 0].tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("noto", "ink", [(4, 1)]),  # the first three letters have no partner
        ("ink", "noto", [(1, 4)]),
        ("panda", "noto", [(2, 1), (3, 2), (4, 3), (5, 4)]),
        ("red cat", "ink dog", [(1, 1), (2, 2)]),
    ],
)
def test_subjects_are_aligned_from_the_end(tiny_pipe, source, target, expected):
    assert positions(pairs_of(tiny_pipe, {source: target}, "subject")) == expected


def test_from_subject_pairs_every_later_position_by_offset(tiny_pipe):
    found = positions(pairs_of(tiny_pipe, {"ink": "noto"}, "from_subject", ("a photo of {}",)))
    assert found == [(4 + offset, 7 + offset) for offset in range(77 - 7)]


@pytest.mark.parametrize(
    ("template", "source", "expected"),
    [
        ("the {} cat in red", "ink", (2, 5)),
        ("ink photo of {}", "ink", (4, 7)),  # the template's own "ink" is not the concept
        ("{} photo of ink", "ink", (1, 4)),
        ("a{}", "ink", (2, 5)),  # glued: "aink" is spelled a-ink
        ("A   photo, of  {} .", "ink", (5, 8)),
        ("é {}", "ink", (3, 6)),  # two bytes, hence two tokens
    ],
)
def test_the_concept_is_where_the_template_puts_it(tiny_pipe, template, source, expected):
    assert positions(pairs_of(tiny_pipe, {source: "noto"}, templates=(template,))) == [expected]


def test_a_concept_that_fills_the_window_is_found_and_a_longer_one_is_refused(tiny_pipe):
    assert positions(pairs_of(tiny_pipe, {"ink": "cat"}, templates=("a " * 74 + "{}",))) == [(75, 75)]
    with pytest.raises(ValueError, match="the subject 'ink' is truncated"):
        pairs_of(tiny_pipe, {"ink": "cat"}, templates=("a " * 75 + "{}",))
    with pytest.raises(ValueError, match="the subject 'noto' is truncated"):
        pairs_of(tiny_pipe, {"ink": "noto"}, templates=("a " * 74 + "{}",))


def test_words_behind_the_concept_may_be_truncated(tiny_pipe):
    assert positions(pairs_of(tiny_pipe, {"ink": "cat"}, templates=("{}" + " a" * 100,))) == [(1, 1)]


def test_preserved_concepts_come_last_and_are_paired_with_themselves(tiny_pipe):
    found = pairs_of(tiny_pipe, {"ink": "cat", "noto": "cat"}, preserve=["dog"], weights={"noto": 3, "dog": 0.5})
    assert found.n_edited == 2
    assert torch.equal(found.source[2:], found.target[2:])
    assert found.weights.tolist() == [1.0, 3.0, 0.5]
    assert [(goal.source, rows) for goal, rows in found.goals] == [
        ("ink", slice(0, 1)),
        ("noto", slice(1, 2)),
        ("dog", slice(2, 3)),
    ]
    assert found.prompts == ["ink", "cat", "noto", "dog"], "a shared prompt is read once"


@pytest.mark.parametrize("name", ["0.self_attention", "0.mlp", "2.self_attention", "1.mlp"])
@pytest.mark.parametrize("tokens", associations.TOKENS)
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


def test_nothing_behind_the_projection_is_computed(tiny_pipe):
    (site,) = sites(tiny_pipe, name="text_encoder.0.self_attention")
    ran = []
    layers = site.module(tiny_pipe).get_submodule("out_proj"), sites(tiny_pipe, name="*.0.mlp")[0].module(tiny_pipe)
    handles = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in layers]
    associate(tiny_pipe, site, pairs_of(tiny_pipe, {"ink": "noto"}))
    for handle in handles:
        handle.remove()
    assert not ran


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
