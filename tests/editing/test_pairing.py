"""Token pairs against positions counted by hand."""

import pytest
import torch

from editing.concepts import Prompt, Request
from editing.pairing import TOKENS, pair_tokens, windows
from mediation.cases import located_tokens
from tests import tiny

# In the tiny vocabulary "ink", "cat" and the templates' words take one token each, other words one per letter.


def pairs_of(pipe, pairs, tokens="last_subject", templates=("{}",), preserve=(), weights=None, network="text_encoder"):
    return pair_tokens(pipe, network, Request.of(pairs, templates, preserve, weights, any_target=True), tokens)


def positions(found):
    """(source position, target position) of every pair."""
    return list(zip(found.source[:, 1].tolist(), found.target[:, 1].tolist(), strict=True))


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
    assert found.folds.tolist() == [0, 0, 0]


def test_the_whole_window_is_aligned_part_by_part_from_the_end(tiny_pipe):
    """In "a photo of n-o-t-o in red" what stands before and behind meets its like, and so do end and padding."""
    found = positions(pairs_of(tiny_pipe, {"ink": "noto"}, "all", ("a photo of {} in red",)))
    words = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9), (7, 10)]
    assert found == words + [(position + 3, position + 3) for position in range(8, 74)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [("last_subject", [5]), ("subject", [4, 5]), ("from_subject", list(range(5, 77))), ("all", list(range(77)))],
)
def test_an_erased_concept_is_read_as_the_empty_prompt_at_the_same_positions(tiny_pipe, tokens, expected):
    found = pairs_of(tiny_pipe, {"red cat": ""}, tokens, ("a photo of {} in ink",))
    assert positions(found) == [(position, position) for position in expected]
    assert [found.prompts[i] for i in found.target[:, 0].unique()] == [""]
    assert [found.prompts[i] for i in found.source[:, 0].unique()] == ["a photo of red cat in ink"]


def test_a_preserved_prompt_keeps_all_its_tokens_but_padding(tiny_pipe):
    kept = [Prompt("a red dog", weight=2), "bird", Prompt("")]
    found = pairs_of(tiny_pipe, {"ink": "cat"}, templates=("{}", "a {}"), preserve=kept)
    assert [(goal.source, goal.is_prompt, rows) for goal, rows in found.goals] == [
        ("ink", False, slice(0, 2)),
        ("bird", False, slice(2, 4)),
        ("a red dog", True, slice(4, 9)),
        ("", True, slice(9, 11)),
    ]
    assert torch.equal(found.source[2:], found.target[2:])
    assert positions(found)[4:] == [(i, i) for i in (*range(5), *range(2))]
    assert found.weights[4:].tolist() == [2.0] * 5 + [1.0] * 2
    assert found.folds.tolist() == [0, 1, 0, 1] + [-1] * 7


def test_a_preserved_prompt_may_fill_the_window_and_not_exceed_it(tiny_pipe):
    found = pairs_of(tiny_pipe, {"ink": "cat"}, preserve=[Prompt("a " * 75)])
    assert positions(found)[1:] == [(i, i) for i in range(77)]
    with pytest.raises(ValueError, match=r"cannot be preserved as a whole: it has 78 tokens, and .* window holds 77"):
        pairs_of(tiny_pipe, {"ink": "cat"}, preserve=[Prompt("a " * 76)])


@pytest.mark.parametrize("tokens", ["last_subject", "all"])
def test_a_preserved_prompt_may_not_start_as_an_edited_one(tiny_pipe, tokens):
    """To a causal encoder the edited token is then the same token."""
    with pytest.raises(ValueError, match=r"'a ink dog' cannot be preserved: up to 'a ink' it is read as 'a ink' is"):
        pairs_of(tiny_pipe, {"ink": "noto"}, tokens, ("{}", "a {}"), preserve=[Prompt("a ink dog")])
    pairs_of(tiny_pipe, {"ink": "noto"}, tokens, ("{}", "a {}"), preserve=[Prompt("red ink dog"), Prompt("a photo")])


@pytest.mark.parametrize(
    ("pairs", "tokens", "templates", "preserve", "words"),
    [
        (
            {"red cat": "ink dog"},
            "subject",
            ("{}",),
            ["red"],
            "'red cat' and 'red' .* up to 'red' .* 'ink dog' .* 'red'",
        ),
        ({"red cat": "dog", "cat": "bird"}, "last_subject", ("{}", "red {}"), (), "up to 'red cat'"),
        ({"red cat": "dog", "red bird": "ink noto"}, "subject", ("{}",), (), None),
        ({"red cat": "ink dog", "red bird": "a noto"}, "subject", ("{}",), (), "up to 'red'"),
        ({"ink": "noto"}, "from_subject", ("{} cat", "{}"), ["ink cat"], "up to 'ink cat'"),
        ({"ink": "", "cat": "dog"}, "all", ("a {}",), (), "'a ink' and 'a cat' .* up to 'a' .* '' and as in 'a dog'"),
        ({"ink": "", "cat": ""}, "all", ("a {}", "a photo of {}"), (), None),
        ({"red cat": "dog", "cat": "bird"}, "last_subject", ("{}", "a {}"), ["red"], None),
    ],
)
def test_a_token_may_not_be_read_in_two_ways(tiny_pipe, pairs, tokens, templates, preserve, words):
    """The same words stand before it: it has one key, and a layer gives one value."""
    if words is None:
        pairs_of(tiny_pipe, pairs, tokens, templates, preserve)
        return
    with pytest.raises(ValueError, match=words):
        pairs_of(tiny_pipe, pairs, tokens, templates, preserve)


@pytest.mark.parametrize(
    ("preserve", "error", "message"),
    [
        ([Prompt("a cat"), Prompt(" a cat")], ValueError, "a prompt would be preserved twice"),
        (Prompt("a cat"), TypeError, "preserve must be a list of strings"),
    ],
)
def test_bad_prompts_are_refused(tiny_pipe, preserve, error, message):
    with pytest.raises(error, match=message):
        pairs_of(tiny_pipe, {"ink": "noto"}, preserve=preserve)


def test_a_prompt_is_checked_when_it_is_made():
    with pytest.raises(TypeError, match="a preserved prompt must be a string, got 3"):
        Prompt(3)
    with pytest.raises(ValueError, match="weight of 'a cat' must be positive"):
        Prompt("a cat", weight=0)


@pytest.mark.parametrize("tokens", TOKENS)
def test_templates_that_start_alike_are_one_fold(tiny_pipe, tokens):
    """Whatever the case, the spaces and the words behind; "aink" starts with another token than "a ink"."""
    templates = ("a photo of {}", "{}", "A  Photo of {} in red", "{} cat", "a photo of  {}", "a{}", "a {}")
    found = pairs_of(tiny_pipe, {"ink": "noto"}, tokens, templates, preserve=["bird"])
    by_template = {
        found.prompts[i]: fold for i, fold in zip(found.source[:, 0].tolist(), found.folds.tolist(), strict=True)
    }
    for concept in ("ink", "bird"):
        assert [by_template[template.format(concept)] for template in templates] == [0, 1, 0, 1, 0, 2, 3]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_tokenizer_is_called_once_however_many_concepts_there_are(tiny_pipe, monkeypatch, tokens):
    kind, calls = type(tiny_pipe.tokenizer), []
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args, **kw: calls.append(args) or call(self, *args, **kw))
    pairs_of(tiny_pipe, {"ink": "noto", "cat": "", "red dog": "noto"}, tokens, preserve=["bird"])
    assert len(calls) == 1


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_windows_are_those_that_the_tokenizer_cuts_and_fills_up(padding):
    tokenizer = tiny.tokenizer(window=9, padding=padding)
    prompts = ["", "ink", "a photo of a red cat in", "a photo of a red cat in ink", "ink " * 20]
    expected = tokenizer(prompts, padding="max_length", max_length=9, truncation=True, return_tensors="pt")
    ids, mask = windows(tokenizer, [located.ids for located in located_tokens(tokenizer, prompts)])
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask)
    assert mask.sum(1).tolist() == [2, 3, 9, 9, 9]
