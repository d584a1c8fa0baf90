"""Figures and intervals against formulas typed anew and cases small enough to do by hand; and their plots."""

import math

import matplotlib.pyplot
import numpy
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st

import editing
from editing.scores import harmonic_mean


def make(values, roles, models=("unedited", "edited"), measure="is_source", images=False):
    """A report from (trial, seed, model) values."""
    dims, values = ("trial", "seed", "model"), numpy.asarray(values, dtype=float)
    variables = {measure: (dims, values), "latent_distance": (dims, numpy.zeros(values.shape))}
    if images:
        variables["images"] = ((*dims, "y", "x", "channel"), numpy.zeros((*values.shape, 4, 4, 3), numpy.uint8))
    coords = {
        "role": ("trial", list(roles)),
        "prompt": ("trial", [f"prompt {i}" for i in range(len(roles))]),
        "seed": list(range(values.shape[1])),
        "model": list(models),
    }
    return xarray.Dataset(variables, coords)


def accuracies(efficacy, specificity, generality):
    """A report whose edited model has these hits in 4 prompts each; the unedited one draws what is said."""
    roles = [role for role in ("efficacy", "specificity", "generality") for _ in range(4)]
    edited = [float(i < hits) for hits in (efficacy, specificity, generality) for i in range(4)]
    return make([[[1.0, hit]] for hit in edited], roles)


@given(hits=st.integers(0, 20), n=st.integers(1, 20), confidence=st.sampled_from([0.9, 0.95]))
def test_accuracies_have_wilsons_interval(hits, n, confidence):
    hits = min(hits, n)
    report = make([[[1.0, float(i < hits)]] for i in range(n)], ["efficacy"] * n)
    cell = editing.summarize_evaluation(report, confidence=confidence, n_resamples=20).sel(
        measure="is_source", role="efficacy", model="edited"
    )
    z = {0.9: 1.6448536, 0.95: 1.9599640}[confidence]
    share = hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert float(cell["mean"]) == pytest.approx(share)
    assert float(cell["low"]) == pytest.approx(middle - half, abs=1e-6)
    assert float(cell["high"]) == pytest.approx(middle + half, abs=1e-6)
    assert int(cell["n"]) == n


def test_scores_have_a_bootstrap_interval_over_prompts():
    random = numpy.random.default_rng(0)
    values = random.normal(size=(60, 1, 1)) + 0.01 * random.normal(size=(60, 5, 2))
    report = make(values, ["quality"] * 60, measure="source_score")
    summary = editing.summarize_evaluation(report).sel(measure="source_score", role="quality")
    half = 1.96 * values.mean(1)[:, 0].std() / math.sqrt(60)
    assert float(summary["mean"][0]) == pytest.approx(values[:, :, 0].mean())
    assert float(summary["high"][0] - summary["mean"][0]) == pytest.approx(half, rel=0.15)
    assert (summary["n"] == 300).all()
    # Paired: what prompts differ in among each other cancels.
    assert float(summary.change_high[1] - summary.change_low[1]) < 0.01
    assert float(summary.change[1]) == pytest.approx((values[..., 1] - values[..., 0]).mean())
    assert float(summary.change[0]) == float(summary.change_high[0]) == 0.0


def test_what_was_not_measured_does_not_count():
    report = make([[[1, 0]], [[numpy.nan, numpy.nan]], [[1, 1]]], ["efficacy"] * 3)
    cell = editing.summarize_evaluation(report, n_resamples=50).sel(measure="is_source", role="efficacy")
    assert cell["n"].values.tolist() == [2, 2]
    assert cell["mean"].values.tolist() == [1.0, 0.5]
    assert cell.change.values.tolist() == [0.0, -0.5]
    nothing = make(numpy.full((2, 1, 2), numpy.nan), ["quality"] * 2)
    cell = editing.summarize_evaluation(nothing, n_resamples=50).sel(measure="is_source")
    assert cell["mean"].isnull().all()
    assert (cell["n"] == 0).all()


def test_a_single_prompt_has_no_bootstrap_interval():
    cell = editing.summarize_evaluation(make([[[1, 2]]], ["quality"], measure="source_score")).sel(role="quality")
    assert cell["mean"].sel(measure="source_score").values.tolist() == [1.0, 2.0]
    assert cell["low"].isnull().all()


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_h0_is_maces_formula(efficacy, specificity, generality):
    summary = editing.summarize_evaluation(accuracies(efficacy, specificity, generality), n_resamples=30)
    aims = (1 - efficacy / 4, specificity / 4, 1 - generality / 4)
    expected = 0.0 if 0 in aims else 3 / sum(1 / aim for aim in aims)
    assert float(summary.h0.sel(model="edited")) == pytest.approx(expected)
    assert float(summary.h0_low.sel(model="edited")) <= expected + 1e-9
    assert float(summary.h0_high.sel(model="edited")) >= expected - 1e-9
    assert float(summary.h0.sel(model="unedited")) == 0.0


def test_h0_of_arrays_and_of_the_papers_table():
    assert harmonic_mean(numpy.array([0.0, 1.0]), 1.0, 0.0).tolist() == [1.0, 0.0]
    assert harmonic_mean(0.0, 0.5, 0.0) == pytest.approx(0.75)
    assert "h0" not in editing.summarize_evaluation(make([[[1, 0]]], ["efficacy"]))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"expected the Dataset that editing.evaluate returns"):
        editing.summarize_evaluation(xarray.Dataset())
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 1"):
        editing.summarize_evaluation(make([[[1, 0]]], ["efficacy"]), confidence=1.0)


def test_bars_are_as_high_as_the_shares():
    report = accuracies(1, 3, 2)
    ax = editing.plot_evaluation(report)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([1, 0.25, 1, 0.5, 1, 0.75])
    assert [text.get_text() for text in ax.texts] == ["efficacy", "generality", "specificity"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["unedited", "edited"] * 3
    matplotlib.pyplot.close(ax.figure)
    with pytest.raises(ValueError, match="nothing was classified"):
        editing.plot_evaluation(make([[[1, 0]]], ["efficacy"], measure="source_score"))


def test_a_sheet_shows_the_first_prompts_of_each_role_before_and_after():
    report = make(numpy.zeros((5, 2, 2)), ["efficacy"] * 3 + ["quality"] * 2, images=True)
    report["images"][3, 1, 1] = 200
    figure = editing.plot_sheet(report, n=3, seed=1)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 10
    labels = [ax.get_xlabel() for ax in shown if ax.get_xlabel()]
    assert labels == [f"prompt {i}" for i in range(5)]
    bright = [ax for ax in shown if ax.images[0].get_array().max() == 200]
    assert [ax.get_xlabel() for ax in bright] == ["prompt 3"]
    matplotlib.pyplot.close(figure)
    with pytest.raises(ValueError, match="keep_images=True"):
        editing.plot_sheet(report.drop_vars("images"))
    with pytest.raises(KeyError):
        editing.plot_sheet(report, seed=9)
