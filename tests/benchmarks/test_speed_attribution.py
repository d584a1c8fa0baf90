"""The released component attribution costs what it is said to cost, and scores what it should."""

import numpy
import pytest
import torch

import mediation
from benchmarks.speed import attribution
from benchmarks.speed.releasedcad import released_scores, trajectory_seed
from benchmarks.speed.sweeps import counting
from mediation.parameters import choose

CONCEPT = "a ink cat"


@pytest.fixture(scope="module")
def names(small_pipe):
    return list(choose(small_pipe, "unet.up.1.*"))


def test_with_one_step_both_procedures_are_one(small_pipe, names):
    """From the same noise, they score the same latents at the same t."""
    options = {"num_inference_steps": 1, "guidance_scale": 3.0}
    released = released_scores(small_pipe, CONCEPT, names, seed=4, **options)
    seed = trajectory_seed(4, 0)
    found = mediation.attribute(small_pipe, CONCEPT, parameters=names, seeds=seed, progress=False, **options)
    for name in names:
        scale = float(found.scores[name].abs().max())
        torch.testing.assert_close(released[name], found.scores[name], rtol=1e-4, atol=1e-5 * scale)


def test_the_release_draws_a_trajectory_for_each_step(small_pipe, names):
    """1 + 2 + 3 guided calls of two rows, and two calls of one row for each of three t."""
    rows, times = [], []

    def count(_module, arguments):
        rows.append(len(arguments[0]))
        times.append(int(arguments[1]))

    handle = small_pipe.unet.register_forward_pre_hook(count)
    try:
        released_scores(small_pipe, CONCEPT, names, num_inference_steps=3)
    finally:
        handle.remove()
    assert rows == [2, 1, 1, 2, 2, 1, 1, 2, 2, 2, 1, 1]
    steps = small_pipe.scheduler.timesteps.tolist()
    assert times == [steps[0]] * 3 + steps[:2] + [steps[1]] * 2 + steps + [steps[2]] * 2, "each x at its own t"


def test_agreement_separates_noise_between_seeds_from_difference_between_procedures():
    random = numpy.random.default_rng(0)
    signal = random.normal(size=20_000)
    noisy = [[signal + random.normal(size=signal.size) for _ in range(4)] for _ in range(2)]
    found = attribution.agreement(dict(zip(("a", "b"), noisy, strict=True)))["pearson"]
    assert found["a, between seeds"] == pytest.approx(0.5, abs=0.03)
    assert found["b, between seeds"] == pytest.approx(0.5, abs=0.03)
    assert found["between procedures, one seed each"] == pytest.approx(0.5, abs=0.03)
    assert found["between procedures, over seeds"] == pytest.approx(0.8, abs=0.03), "1 / (1 + 1/4)"
    assert found["n_seeds"] == 4
    with pytest.raises(ValueError, match="give at least two of each"):
        attribution.agreement({"a": noisy[0], "b": noisy[1][:1]})


def test_the_measured_part_costs_as_much_for_each_place_as_the_whole_exact_map(small_pipe):
    """In rows that the denoiser evaluates; places at the first of four steps would cost 1.6 times as much."""
    options = {"metric": mediation.LatentDistance(), "num_inference_steps": 4, "progress": False}
    rows = []
    for n_sites in (15, 29):
        with counting(small_pipe) as counter:
            mediation.trace(small_pipe, attribution.CASE, **attribution.part_of_exact(small_pipe, n_sites), **options)
        rows.append(counter["rows"] / n_sites)
    assert rows[0] == pytest.approx(rows[1], rel=0.1)


def test_the_report_has_times_and_correlations(small_pipe):
    found = attribution.component_attribution(small_pipe, CONCEPT, steps=1, repeats=1)
    assert found["speedup"]["median"] == pytest.approx(
        found["seconds"]["released"]["median"] / found["seconds"]["one trajectory"]["median"]
    )
    assert found["n_weights"] == sum(
        small_pipe.unet.get_parameter(name[5:]).numel() for name in choose(small_pipe, None)
    )
    patched = attribution.activation_attribution(small_pipe, steps=2, repeats=1, n_sites=5)
    assert (patched["n_places"], patched["n_exact"]) == (58, 10), "29 and 5 sites at 2 steps"
    exact, estimated = (patched["seconds"][name]["median"] for name in ("some exact", "estimates"))
    assert patched["exact_over_estimates"]["median"] == pytest.approx(5.8 * exact / estimated)
    table = attribution.markdown({"machine": attribution.machine(), "activations": patched, "components": found})
    assert f"| {found['agreement']['pearson']['between procedures, over seeds']:.3f} |" in table
