"""The speed benchmark of editing: what it edits, what it compares with, and what its tables say."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed import accuracy, clip, editing_report
from benchmarks.speed.accuracy import least_squares
from benchmarks.speed.editing import fitter_run, quickfix_run
from tests import tiny


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@given(n=st.integers(1, 1000), n_preserved=st.integers(0, 1000))
def test_no_concept_is_given_twice(n, n_preserved):
    pairs, preserved = clip.concepts(n, n_preserved)
    every = [*pairs, *pairs.values(), *preserved]
    assert len(set(every)) == len(every) == 2 * n + n_preserved


def test_each_word_is_a_token():
    pairs, preserved = clip.concepts(1000, 1000)
    words = {word for concept in (*pairs, *pairs.values(), *preserved) for word in concept.split()}
    tokens = clip.tokenizer()([*sorted(words), "photo", "image"])["input_ids"]
    assert {len(ids) for ids in tokens} == {3}, "its own, between those of start and end"


def test_the_fitters_edit_is_the_one_of_quickfix(pipe):
    whole, parts = quickfix_run(pipe, 60)(), fitter_run(pipe, 60)()
    (a,), (b,) = whole.updates.values(), parts.updates.values()
    torch.testing.assert_close(b.dense(), a.dense(), rtol=0, atol=1e-4 * float(a.norm()))
    assert len(parts.metadata["pairs"]) == len(parts.metadata["preserve"]) == 60


@given(seed=st.integers(0, 1000), n=st.integers(1, 12), regularization=st.sampled_from([0.5, 0.01, 1e-3]))
def test_the_truth_has_no_gradient(seed, n, regularization):
    rng = numpy.random.default_rng(seed)
    keys, residuals = (torch.from_numpy(rng.normal(size=(n, width))) for width in (6, 4))
    for route in ("qr", "svd"):
        change = least_squares(keys, residuals, regularization, route)
        gradient = (change @ keys.T - residuals.T) @ keys + regularization * change
        assert gradient.abs().max() < 1e-10


def test_one_concept_is_measured_as_well_as_several(pipe, monkeypatch):
    monkeypatch.setattr(accuracy, "LAMBDAS", (1e-4,))
    rows = accuracy.solve_accuracy(pipe)
    assert [(row["tokens"], row["n_concepts"]) for row in rows] == [
        ("last_subject", 1), ("last_subject", 5), ("from_subject", 1), ("from_subject", 5)
    ]  # fmt: skip
    assert all(row["stored"] < 1e-6 for row in rows)


def measured(**changes):
    cell = {"median": 0.02, "low": 0.01, "high": 0.03, "n": 3}
    row = {"tokens": "last_subject", "n_concepts": 1, "lambda": 0.01, "n_keys": 4}
    row |= {"solved": 1e-12, "stored": 1e-7, "truth": 1e-14}
    row |= {"released": 3e-2, "solved weight": 1e-13, "stored weight": 1e-8, "released weight": 1e-3}
    found = {
        "machine": {"processor": "P", "threads": 2, "load": 0.5, "versions": {"torch": "2"}},
        "n_parameters": 123_000_000,
        "one": {
            "seconds": {"quickfix": cell, "released": cell, "prompts to factors": cell},
            "stages": {"keys": cell},
            "speedup": cell,
            "speedup from prompts to factors": cell | {"median": 60.0},
        },
        "many": {name: {"1": cell, "1000": cell | {"median": 20.0}} for name in ("quickfix", "fitter")}
        | {"released": {"1": cell}},
        "accuracy": [row | {"tokens": t, "n_concepts": n} for t in accuracy.TOKENS for n in accuracy.N_CONCEPTS],
        "memory": {name: {"1": 10.0, "1000": 300.0} for name in ("quickfix", "fitter")},
    }
    return found | changes


def test_goals_are_met_or_not():
    assert [met for *_, met in editing_report.goals(measured())] == [True] * 4
    slow = measured(many={"quickfix": {"1000": {"median": 31.0}}})
    assert [met for *_, met in editing_report.goals(slow)] == [True, True, True, False]
    rough = measured(accuracy=[{"solved": 1e-12, "stored": 2e-6}])
    assert [met for *_, met in editing_report.goals(rough)][2] is False
    few = measured(many={"quickfix": {"10": {"median": 1.0}}})
    assert len(editing_report.goals(few)) == 3, "what was not measured is neither"


def test_the_table_and_the_figure_show_what_was_measured():
    found = measured()
    text = editing_report.markdown(found)
    assert "| 1000 | 20 | 20 |  | 300 | 300 |" in text
    assert "123,000,000 random weights" in text
    assert "| from_subject | 5 | 4 | 0.01 | 1.0e-12 | 1.0e-07 |" in text
    figure = editing_report.draw(found)
    time, memory, error = figure.axes
    assert [line.get_label() for line in time.lines] == ["quickfix", "Fitter, by parts", "the release"]
    assert time.lines[0].get_ydata().tolist() == [0.02, 20.0]
    assert memory.lines[0].get_ydata().tolist() == [10.0, 300.0]
    assert sorted({y for line in error.lines for y in line.get_ydata()}) == [1e-7, 3e-2]
    assert "quickfix, from_subject, 1 concept" in [line.get_label() for line in error.lines]
    editing_report.matplotlib.pyplot.close(figure)
