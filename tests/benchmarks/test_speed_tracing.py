"""What is timed is the same sweep, counted, and compared with what it may cost."""

import functools

import numpy
import pytest

import mediation
from benchmarks.speed import measuring, sweeps, tracing
from benchmarks.speed.sweeps import Sweep
from mediation import LatentDistance
from mediation.sampling import Sampling
from tests.runs import CASE


@pytest.fixture
def sweep(small_pipe):
    sites = tuple(mediation.sites(small_pipe, network="unet", block="mid"))
    return Sweep(small_pipe, CASE, sites, LatentDistance(), Sampling(2, 4.0), batch_size=5)


def test_triples_give_the_map_that_tracing_gives(sweep):
    assert numpy.ptp(sweeps.traced(sweep)) > 0
    numpy.testing.assert_allclose(sweeps.triples(sweep), sweeps.traced(sweep), atol=1e-5)


def test_evaluations_are_counted(sweep):
    """Five sites and the sham, three at a time: two chunks of 3 + 2 rows, in two halves, at two steps.

    At the first of these, the five sites' rows share the unconditional half of their sham.
    """
    assert len(sweep.sites) == 5
    assert sweeps.count_evaluations(sweep) == {
        "rows": 10,
        "rows_at_most": 5 + 2 * 2 + 3,
        "evaluations": 40 - 5,
        "evaluations_at_most": 48,
        "chunk": 3,
        "rows_per_call": 5,
    }


@pytest.mark.parametrize(("n_evaluations", "batch_size", "n_calls"), [(40, 16, 3), (40, 40, 1), (8, 3, 3)])
def test_the_limit_evaluates_as_often(sweep, n_evaluations, batch_size, n_calls):
    with sweeps.counting(sweep.pipe) as counter:
        sweeps.limit(sweep, n_evaluations, n_rows=10, batch_size=batch_size, n_at_once=5)
    assert counter == {"rows": n_evaluations, "calls": n_calls}


def test_the_large_pipeline_has_the_configuration_of_sd_1_4(monkeypatch):
    given = {}
    monkeypatch.setattr(sweeps.tiny, "stable_diffusion", lambda **overrides: given.update(overrides))
    sweeps.load("sd14")
    assert given["unet"]["block_out_channels"] == (320, 640, 1280, 1280)
    assert given["unet"]["layers_per_block"] == 2
    assert given["text_encoder"]["hidden_size"] == given["unet"]["cross_attention_dim"] == 768


def test_ways_that_disagree_are_not_compared():
    maps = {"traced": numpy.array([1.0, 2.0]), "triples": numpy.array([1.0, 2.0005])}
    assert tracing.check_agreement(maps) == {"triples": pytest.approx(0.0005)}
    for wrong in (2.1, numpy.nan):
        with pytest.raises(RuntimeError, match="triples give other maps"):
            tracing.check_agreement(maps | {"triples": numpy.array([1.0, wrong])})


def test_the_report_says_what_was_measured():
    seconds = {"traced": [2.0, 2.0], "triples": [5.0, 6.0], "limit": [1.8, 1.9]}
    model = {
        "steps": 10,
        "sites": 32,
        "metric": "clip_score",
        "row_evaluations": {"rows": 38, "chunk": 30, "rows_at_most": 66, "evaluations": 760},
        "best_batch_size_of_unet": 16,
        "seconds": seconds,
        "ratios": {way: measuring.ratio(values, seconds["traced"]) for way, values in seconds.items()},
    }
    memory = [{"steps": 10, "sites": 10, "mib": 123.4}]
    report = {
        "machine": {"processor": "a processor", "cores": 2, "threads": 1, "load": 0.5},
        "repeats": 2,
        "nnsight": False,
        "memory": memory,
        "models": {"emoji": model},
    }
    page = tracing.as_markdown(report)
    assert "| three rows per site | 5.5 [5, 6] | 2.75× [2.5, 3] | ≥ 2.5 |" in page
    assert "| 10 | 10 | 123 |" in page
    assert "38 rows in chunks of 30, at most 66 allowed; 760 row-evaluations of the U-Net counted" in page
    assert "nnsight is not installed" in page
    assert "nnsight is not installed" not in tracing.as_markdown(report | {"nnsight": True})


def test_peak_memory_is_what_a_run_adds():
    mib = measuring.peak_memory(functools.partial, numpy.ones, 40 * 2**17)  # 40 MiB of float64
    assert 38 < mib < 60
