"""How runs are dealt out to batches: every one is measured, and the controls cost no more than they may."""

import collections
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mediation
from benchmarks.speed.sweeps import counting
from mediation import LatentDistance
from mediation.restoration import n_computed_rows
from mediation.rows import CLEAN, CORRUPTED
from tests.runs import CASE


def at_most(n, chunk):
    """Rows of n restored runs in chunks of so many, controls and what fills chunks up included."""
    return n + 2 * math.ceil(n / chunk) + chunk


def number(images, latents, cases):
    """A metric that reads what `numbered` writes."""
    return latents[:, 0, 0, 0]


number.needs_images = False


@hypothesis.given(st.integers(1, 50), st.integers(1, 20), st.sampled_from(["restore", "knock_out"]))
@hypothesis.example(4, 2, "restore")
@hypothesis.example(4, 1, "restore")
@hypothesis.example(50, 3, "restore")
def test_every_run_is_measured_within_the_bound(tiny_pipe, n, chunk, mode):
    """Sampling is left out: a run's only latent is the number of its site, and of controls, minus one or two."""
    sites = mediation.sites(tiny_pipe)[:n]
    numbers = {site.name: i for i, site in enumerate(sites)}
    controls, counter = {CLEAN: -1.0, CORRUPTED: -2.0}, collections.Counter()

    def numbered(values):
        counter["rows"] += len(values)
        return torch.tensor(values)[:, None, None, None]

    def sample_rows(pipe, case, draw, rows, sampling):
        assert len(rows) <= chunk
        own = [float(numbers[row.sites[0].name]) if row.sites else controls[row.sham] for row in rows]
        return numbered([*controls.values(), *own])

    def sample_alone(pipe, case, conditioning, run, sampling):
        return numbered([controls[run]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mediation.plans.sample_rows", sample_rows)
        patch.setattr("mediation.restoration.sample_alone", sample_alone)
        effects = mediation.trace(
            tiny_pipe, CASE, sites=sites, metric=number, mode=mode, batch_size=chunk + 2, progress=False
        )
    assert effects.restored.values.ravel().tolist() == list(range(n))
    assert (effects.clean.item(), effects.corrupted.item()) == (-1, -2)
    assert set(effects.sham.values.ravel().tolist()) == {-2 if mode == "restore" else -1}
    assert counter["rows"] == n_computed_rows(n, batch_size=chunk + 2) <= at_most(n, chunk)


@pytest.mark.parametrize(
    ("n", "chunk", "n_rows"), [(4, 2, 9), (4, 1, 13), (6, 3, 11), (5, 3, 10), (1, 1, 4), (1, 9, 4)]
)
@pytest.mark.parametrize("mode", ["restore", "knock_out"])
def test_the_denoiser_computes_as_many_rows(shallow_pipe, n, chunk, n_rows, mode):
    sites = mediation.sites(shallow_pipe, component="resnet")[:n]
    with counting(shallow_pipe) as counter:
        effects = mediation.trace(
            shallow_pipe, CASE, sites=sites, metric=LatentDistance(), mode=mode, batch_size=chunk + 2,
            num_inference_steps=2, guidance_scale=1.0, progress=False,
        )  # fmt: skip
    assert counter["rows"] == 2 * n_rows
    assert n_rows <= at_most(n, chunk)
    total = float(mediation.total_effect(effects).squeeze())
    untouched = effects.corrupted if mode == "restore" else effects.clean
    assert total > 1e-3
    assert float(abs(effects.sham - untouched).max()) < 1e-4 * total
