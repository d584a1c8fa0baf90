"""The profile of tracing: parts and kinds that add up, and a report that says what was measured."""

import dataclasses

import pytest

from benchmarks.speed import profiling
from mediation.sampling import Sampling


@pytest.fixture(scope="module")
def sweep():
    whole = profiling.make_sweep()
    return dataclasses.replace(whole, sites=whole.sites[-2:], sampling=Sampling(1, 4.0))


@pytest.fixture(scope="module")
def profile(sweep):
    return profiling.profile(sweep)


def test_parts_add_up_to_the_whole_and_kinds_to_one(profile):
    parts = {"U-Net", "text encoder", "decoder", "scorer", "scheduler", "everything else"}
    assert set(profile["parts"]) == parts
    assert sum(profile["parts"].values()) == pytest.approx(profile["seconds"])
    assert all(seconds > 0 for seconds in profile["parts"].values()), "no part lies within another"
    assert sum(profile["kinds"].values()) == pytest.approx(1)
    assert profile["kinds"]["convolution"] > 0.05


def test_the_pipeline_is_left_as_it_was(sweep, profile):
    for owner, name in ((sweep.pipe.unet, "forward"), (sweep.pipe.vae, "decode"), (sweep.pipe.scheduler, "step")):
        assert name not in vars(owner)


def test_the_report_compares_allocators_by_their_medians(profile):
    runs = {
        "plain": [{"seconds": s, "page_faults": 1000} for s in (2.0, 4.0, 3.0)],
        "keeping": [{"seconds": 1.0, "page_faults": 10}] * 3,
    }
    machine = {"processor": "a processor", "cores": 2, "threads": 2, "load": 0.0}
    page = profiling.as_markdown({"machine": machine, "profile": profile, "allocator": runs})
    assert "| plain | 3 [2, 4] | 1,000 |" in page
    assert "3× [2, 4] faster" in page
