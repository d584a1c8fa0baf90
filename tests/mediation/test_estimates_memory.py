"""What estimates keep in memory: the graph of one step, of few rows, and latents."""

import contextlib
import gc

import numpy
import pytest
import torch

import mediation
from mediation import Case, LatentDistance, ReplaceSubject, adjoint, attribution
from mediation.pipelines import family_of
from tests import tiny
from tests.mediation.test_adjoint import Held
from tests.runs import double

CASE = Case("a photo of a cat in ink style", subject="cat", corruption=ReplaceSubject("dog"), seed=3)
OPTIONS = {"backend": "attribution_patching", "guidance_scale": 4.0, "progress": False}
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


@pytest.fixture(scope="module")
def pipe():
    return double(tiny.shallow())


@pytest.fixture
def frozen_heap():
    """What is there before a test need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_numbers():
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = [found.untyped_storage() for found in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) // 8


def most_kept(pipe, n_steps):
    """Numbers that autograd keeps at most."""
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda owner: owner.kept[0]):
        mediation.trace(pipe, CASE, metric=LatentDistance(), num_inference_steps=n_steps, **OPTIONS)
    return held.n_most


def kept_between(pipe, n_steps):
    """Numbers that Python keeps once all runs are sampled: latents, and calls to make again on the way back."""
    live = []

    def metric(images, latents, cases):
        live.append(live_numbers())
        return latents.square().mean((1, 2, 3))

    mediation.trace(pipe, CASE, metric=metric, num_inference_steps=n_steps, **OPTIONS)
    return max(live)


def test_memory_grows_by_latents_alone_with_steps(pipe, frozen_heap, monkeypatch):
    latents = numpy.prod(family_of(pipe).latent_shape(pipe))
    states = family_of(pipe).encode(pipe, ["a cat"])["prompt_embeds"].numel()
    assert 0 <= (kept_between(pipe, 4) - kept_between(pipe, 2)) / 2 <= 10 * latents
    few, many = (most_kept(pipe, n_steps) for n_steps in (2, 6))
    # what goes into the denoiser in both halves; prompts' states are counted each time, and shared by all steps
    assert 0 <= (many - few) / 4 - 2 * states <= 10 * latents
    # the control: without recomputing, every step keeps its graph
    monkeypatch.setattr(adjoint, "recomputing", lambda *_: contextlib.nullcontext())
    assert most_kept(pipe, 6) > 4 * many


def test_no_more_rows_run_at_once_than_fit_with_their_graphs(pipe, monkeypatch):
    """Whatever the batch size of runs without gradients; and estimates are the same. 16 rows are the default."""
    n_rows, denoise = [], attribution.denoise
    monkeypatch.setattr(attribution, "denoise", lambda *args: n_rows.append(len(args[3])) or denoise(*args))
    options = {"sites": ["unet.mid.0.resnet"], "metric": LatentDistance(), "num_inference_steps": 1, **OPTIONS}
    estimates = []
    for most, expected in ((16, [16, 4]), (4, [4] * 6), (1, [2] * 18), (64, [19])):
        if most != 16:
            monkeypatch.setattr(attribution, "rows_with_graph", lambda _, most=most: most)
        n_rows.clear()
        estimates.append(mediation.trace(pipe, CASE, integrated=19, batch_size=64, **options).restored)
        assert n_rows == expected
        assert sum(n_rows) == 19 + len(expected) - 1
    for estimate in estimates[:-1]:
        numpy.testing.assert_allclose(estimate, estimates[-1], rtol=1e-9)
