"""Concepts in parts: the same edit as in one go, however they are split, saved and merged."""

import itertools
import types

import pytest
import torch

import editing
from editing import clock
from tests import tiny

PAIRS = {"ink": "noto", "cat": "bird", "panda": "dog"}
OPTIONS = {"templates": ("{}", "a photo of {}"), "tokens": "subject"}


@pytest.fixture
def parts(tiny_pipe):
    """Two fitters, which know different concepts."""
    first, second = (editing.Fitter(tiny_pipe, **OPTIONS) for _ in range(2))
    first.update({"ink": "noto"}, preserve=["red"], weights={"ink": 3})
    second.update({"cat": "bird"}, preserve=[editing.Prompt("a dog in red", weight=0.5)])
    second.update({"panda": "dog"})
    return first, second


def batch(pipe, regularization):
    return editing.quickfix(
        pipe,
        PAIRS,
        preserve=["red", editing.Prompt("a dog in red", weight=0.5)],
        weights={"ink": 3},
        regularization=regularization,
        **OPTIONS,
    )


def same(a, b):
    (one,), (other,) = a.updates.values(), b.updates.values()
    torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=2e-5)
    assert one.norm() > 0.1


@pytest.mark.parametrize("regularization", [0.01, editing.Relative(0.05)])
def test_it_yields_the_edit_of_all_concepts_at_once(tiny_pipe, parts, regularization):
    first, second = parts
    first.merge(second)
    edit, expected = first.fit(regularization=regularization), batch(tiny_pipe, regularization)
    same(edit, expected)
    for key in ("method", "pairs", "templates", "preserve", "preserve_prompts", "weights", "tokens", "sites", "base"):
        assert edit.metadata[key] == expected.metadata[key]
    assert edit.metadata["regularization"] == expected.metadata["regularization"]
    (misfit,) = edit.report["misfit"].values()
    assert misfit["after"] < 0.2 * misfit["before"]


def test_its_report_counts_the_time_of_all_updates(tiny_pipe, monkeypatch):
    """A second for each look at the clock; what passes between two updates is not counted."""
    now = itertools.count()
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: next(now)))
    fitter = editing.Fitter(tiny_pipe, **OPTIONS)
    for source in PAIRS:
        fitter.update({source: PAIRS[source]})
        clock.time.perf_counter()
    for _ in range(2):
        report = fitter.fit().report
        stages = {"tokens": 3000, "keys": 3000, "sums": 3000, "solve": 1000, "report": 2000}
        assert report["milliseconds"] == stages
        assert report["seconds"] == 12
        assert not {"residual", "interference"} & set(report)


def test_it_goes_on_where_it_was_saved(tiny_pipe, parts, tmp_path):
    first, second = parts
    first.save(tmp_path / "first.safetensors")
    loaded = editing.Fitter.load(tmp_path / "first.safetensors", tiny_pipe)
    loaded.merge(second)
    same(loaded.fit(), batch(tiny_pipe, 0.01))
    loaded.merge(editing.Fitter(tiny_pipe))  # one that was given nothing adds nothing
    same(loaded.fit(), batch(tiny_pipe, 0.01))


def test_its_rank_is_the_number_of_edited_keys(tiny_pipe):
    fitter = editing.Fitter(tiny_pipe, templates=["{}"])
    fitter.update({"ink": "noto"}, preserve=["cat"])
    fitter.update({"red": "noto"})
    (update,) = fitter.fit().updates.values()
    assert update.rank == 2


def test_concepts_that_contradict_earlier_ones_are_refused_and_not_added(tiny_pipe, parts):
    first, second = parts
    before = first.fit()
    for pairs, preserve, message in [
        ({"ink": "cat"}, (), "source concept was given twice: 'ink'"),
        ({"Ink": "cat"}, (), "'ink' and 'Ink' are one concept"),
        ({"cat": "bird"}, ["ink"], "'ink' would be edited and preserved"),
        ({"cat": "bird"}, ["red"], "'red' would be preserved twice"),
        ({"red": "bird"}, (), "'red' would be edited and preserved"),
        ({"red cat": "a dog"}, (), "'red' and 'red cat' contradict each other: up to 'red'"),
        ({"bird": "dog"}, [editing.Prompt("ink dog")], "'ink dog' cannot be preserved: up to 'ink' it is read as"),
    ]:
        with pytest.raises(ValueError, match=message):
            first.update(pairs, preserve=preserve)
    with pytest.raises(ValueError, match="given twice"):
        first.merge(first)
    same(first.fit(), before)
    assert second.request.pairs == {"cat": "bird", "panda": "dog"}


def test_a_prompt_counts_once_however_concepts_are_split(tiny_pipe, tmp_path):
    """As for `quickfix`, which refuses it twice; counted twice it would hold back twice as much."""
    kept = [editing.Prompt(""), editing.Prompt("a dog in red")]
    fitter, second = (editing.Fitter(tiny_pipe, **OPTIONS) for _ in range(2))
    fitter.update({"ink": "noto"}, preserve=kept)
    fitter.save(tmp_path / "first.safetensors")
    second.update({"cat": "bird"}, preserve=[editing.Prompt(" A  dog in red")])
    for one in (fitter, editing.Fitter.load(tmp_path / "first.safetensors", tiny_pipe)):
        with pytest.raises(ValueError, match=r"the prompt 'A  dog in red' would be preserved twice.*'a dog in red'"):
            one.update({"cat": "bird"}, preserve=[editing.Prompt("A  dog in red")])
        with pytest.raises(ValueError, match="would be preserved twice"):
            one.merge(second)
        one.update({"cat": "bird"})
        same(one.fit(), editing.quickfix(tiny_pipe, {"ink": "noto", "cat": "bird"}, preserve=kept, **OPTIONS))
    with pytest.raises(ValueError, match="would be preserved twice"):
        editing.quickfix(tiny_pipe, {"ink": "noto"}, preserve=[*kept, editing.Prompt("A DOG in red")], **OPTIONS)


def test_earlier_concepts_are_not_tokenized_again(tiny_pipe, monkeypatch):
    fitter, kind, seen = editing.Fitter(tiny_pipe, **OPTIONS), type(tiny_pipe.tokenizer), []
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, texts, **kw: seen.append(texts) or call(self, texts, **kw))
    for source, target in PAIRS.items():
        fitter.update({source: target})
    assert [len(texts) for texts in seen] == [4, 4, 4], "two concepts in two templates, once each"


def test_only_fitters_of_the_same_kind_and_base_are_merged(tiny_pipe, parts, tmp_path):
    first, _ = parts
    other = editing.Fitter(tiny_pipe, templates=["{}"], tokens="subject")
    other.update({"cat": "bird"})
    with pytest.raises(ValueError, match="fitters of different templates cannot be merged"):
        first.merge(other)
    stranger = tiny.stable_diffusion(seed=1)
    foreign = editing.Fitter(stranger, **OPTIONS)
    foreign.update({"cat": "bird"})
    with pytest.raises(ValueError, match="different base models"):
        first.merge(foreign)
    first.save(tmp_path / "first.safetensors")
    with pytest.raises(ValueError, match=r"another base model: at text_encoder.0.self_attention, its values differ"):
        editing.Fitter.load(tmp_path / "first.safetensors", stranger)


def test_weights_that_change_in_between_are_noticed(fresh_pipe):
    fitter = editing.Fitter(fresh_pipe)
    fitter.update({"ink": "noto"})
    with fitter.fit().applied(fresh_pipe), pytest.raises(ValueError, match="given another base model"):
        fitter.update({"cat": "bird"})


def test_bad_use_is_refused(tiny_pipe, parts, tmp_path):
    with pytest.raises(ValueError, match=r"1.mlp receives what the edit at text_encoder.0.mlp changes"):
        editing.Fitter(tiny_pipe, site=["text_encoder.1.mlp", "text_encoder.0.mlp"])
    empty = editing.Fitter(tiny_pipe)
    with pytest.raises(ValueError, match="nothing to fit"):
        empty.fit()
    with pytest.raises(ValueError, match="nothing to save"):
        empty.save(tmp_path / "empty.safetensors")
    with pytest.raises(TypeError, match="must be a number, got 'auto'"):
        parts[0].fit(regularization="auto")
    parts[0].fit().save(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="is no fitter file"):
        editing.Fitter.load(tmp_path / "edit.safetensors", tiny_pipe)
