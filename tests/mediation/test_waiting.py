"""Rows that are still another run: the same maps, for fewer evaluations of the denoiser."""

import contextlib
import functools
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import mediation
from benchmarks.speed.sweeps import counting
from mediation import Case, LatentDistance, ReplaceSubject
from mediation.rows import CLEAN, CORRUPTED, Intervention
from mediation.sampling import Sampling, sample_rows
from mediation.waiting import Waiting
from tests import tiny
from tests.runs import CASE, SAMPLING, alone, double, rms

SITES = ["unet.mid.0.resnet", "unet.mid.0.self_attention", "unet.up.1.1.cross_attention"]
N_STEPS = 4
WINDOWS = [(0.0, 0.5), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0)]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "multistep": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
pytestmark = pytest.mark.no_cover  # what runs here is covered elsewhere, and slow to measure


class RowNoise(diffusers.DDIMScheduler):
    """Sets the rows of a batch apart, as schedulers with a noise sampler of their own do."""

    def step(self, model_output, timestep, sample, **options):
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(int(timestep)), dtype=sample.dtype)
        return super().step(model_output, timestep, sample + 0.1 * noise, **options)


@pytest.fixture(scope="module")
def pipe():
    return double(tiny.shallow())


def use(monkeypatch, pipe, scheduler):
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))


def traced(pipe, **options):
    """A map, and how many rows the denoiser computed in each half of guidance."""
    given = {"sites": SITES, "windows": WINDOWS, "metric": LatentDistance(), "num_inference_steps": N_STEPS}
    with counting(pipe) as counter:
        effects = mediation.trace(pipe, CASE, **(given | {"guidance_scale": 4.0, "progress": False} | options))
    return effects, counter["rows"] / 2


def sampled(pipe, rows):
    """Latents, and how many rows the denoiser computed in each half of guidance."""
    with counting(pipe) as counter:
        latents = sample_rows(pipe, CASE, 0, rows, Sampling(N_STEPS, 4.0))
    return latents, counter["rows"] / 2


def without_waiting(monkeypatch):
    monkeypatch.setattr(Waiting, "_may_wait", lambda *args: False)


def largest_difference(a, b):
    return max(float(abs(a[name] - b[name]).max()) for name in ("clean", "corrupted", "sham", "restored"))


# diffusers' Euler scheduler makes arrays of tensors in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_runs_are_the_same_and_fewer_rows_are_computed(pipe, monkeypatch, scheduler):
    """In float64, so that nothing but rounding can hide: 1e-9 of the total effect. Both modes share a batch."""
    use(monkeypatch, pipe, SCHEDULERS[scheduler])
    sites = [mediation.sites(pipe, name=name)[0] for name in SITES]
    rows = []
    for mode in ("restore", "knock_out"):
        rows += [Intervention((site,), window=window, mode=mode) for site in sites for window in WINDOWS]
        rows.append(Intervention(mode=mode))
    shared, n_shared = sampled(pipe, rows)
    without_waiting(monkeypatch)
    apart, n_apart = sampled(pipe, rows)
    total = rms(apart[CORRUPTED], apart[CLEAN])
    assert total > 1e-3
    for mode in ("restore", "knock_out"):
        effects = [rms(run, apart[row.sham]) for row, run in zip(rows, apart[2:], strict=True) if row.mode == mode]
        assert max(effects) > 1e-3 * total
    assert max(rms(one, other) for one, other in zip(shared, apart, strict=True)) < 1e-9 * total
    assert n_shared < 0.75 * n_apart


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families_share_all_that_their_denoiser_reads(monkeypatch, family):
    pipe = double(tiny.shallow(family))
    options = {"sites": [site.name for site in mediation.sites(pipe, network="unet", block="mid")]}
    options["windows"] = WINDOWS[1:3]
    shared, n_shared = traced(pipe, **options)
    without_waiting(monkeypatch)
    apart, n_apart = traced(pipe, **options)
    assert largest_difference(shared, apart) < 1e-9 * float(mediation.total_effect(apart).squeeze())
    assert n_shared < 0.75 * n_apart


def test_the_denoiser_computes_the_controls_and_what_was_changed_so_far(shallow_pipe):
    """Three sites: clean, corrupted and the sham row at every step, and each other row from its window's start."""
    _, n_rows = traced(shallow_pipe)
    steps_to_the_end = [sum(step / N_STEPS >= start for step in range(N_STEPS)) for start, _ in WINDOWS]
    assert steps_to_the_end == [4, 3, 2, 1]
    n_shared_halves = len(SITES) * len(WINDOWS)  # in the first step of each
    assert n_rows == 3 * N_STEPS + len(SITES) * sum(steps_to_the_end) - n_shared_halves / 2


@pytest.mark.parametrize(
    ("branch", "network", "n_shared"),
    [("cond", "unet", 3), ("cond", "text_encoder", 3), ("uncond", "unet", 3), ("both", "unet", 0)],
)
def test_the_first_step_computes_the_half_that_is_not_changed_for_the_controls_alone(
    shallow_pipe, monkeypatch, branch, network, n_shared
):
    options = {"sites": mediation.sites(shallow_pipe, network=network)[-3:], "windows": None, "branch": branch}
    shared, n_rows = traced(shallow_pipe, num_inference_steps=1, **options)
    without_waiting(monkeypatch)
    apart, n_apart = traced(shallow_pipe, num_inference_steps=1, **options)
    assert n_apart - n_rows == n_shared / 2
    assert largest_difference(shared, apart) < 1e-4 * float(mediation.total_effect(apart).squeeze())


@pytest.mark.parametrize(
    ("windows", "n_expected", "n_without"),
    [("each", 240, 432), ([(0.0, 0.5), (0.5, 1.0)], 114, 144), (None, 93, 96)],
)
def test_the_gain_that_the_guide_states(shallow_pipe, monkeypatch, windows, n_expected, n_without):
    """Three sites and eight steps, of which a row with a window of one step takes 4.5 on average, for 8."""
    options = {"windows": windows, "num_inference_steps": 8}
    assert 2 * traced(shallow_pipe, **options)[1] == n_expected
    without_waiting(monkeypatch)
    assert 2 * traced(shallow_pipe, **options)[1] == n_without


def test_a_window_without_a_step_is_no_measurement(shallow_pipe):
    with counting(shallow_pipe) as counter, pytest.raises(ValueError, match=r"nothing happens in .* \(0\.3, 0\.4\)"):
        traced(shallow_pipe, windows=[(0.0, 0.5), (0.3, 0.4)])
    assert counter["rows"] == 0


def test_rows_that_the_scheduler_sets_apart_are_computed(pipe, monkeypatch):
    use(monkeypatch, pipe, RowNoise)
    shared, n_shared = traced(pipe)
    without_waiting(monkeypatch)
    apart, n_apart = traced(pipe)
    n_waiting_at_first = sum(1 if start > 0 else 0.5 for start, _ in WINDOWS) * len(SITES)
    assert n_shared == n_apart - n_waiting_at_first  # all start from the same latents
    assert largest_difference(shared, apart) < 1e-9 * float(mediation.total_effect(apart).squeeze())


def test_a_row_with_text_of_its_own_does_not_wait(shallow_pipe):
    """Its text encoder was restored from the beginning, whatever its window says of the denoiser."""
    case = Case(CASE.prompt, subject="cat", corruption=ReplaceSubject("dog"), seed=3)
    text = mediation.sites(shallow_pipe, network="text_encoder", component="block")[-1]
    late = mediation.sites(shallow_pipe, name="unet.mid.0.resnet")[0]
    rows = [Intervention((text, late), window=(0.7, 1.0))]
    latents = sample_rows(shallow_pipe, case, 0, rows, SAMPLING)
    damage = rms(latents[CORRUPTED], latents[CLEAN])
    assert damage > 1e-3
    assert rms(latents[2], latents[CLEAN]) < 1e-3 * damage


@pytest.mark.parametrize(("branch", "guidance_scale"), [("cond", 1.0), ("cond", 4.0), ("uncond", 4.0), ("both", 4.0)])
def test_a_late_row_is_the_row_that_is_computed_alone(pipe, monkeypatch, branch, guidance_scale):
    """With company that waits for longer, and without any waiting."""
    site = (mediation.sites(pipe, name="unet.mid.0.resnet")[0],)
    rows = [Intervention(site, window=(start, 1.0)) for start in (0.75, 0.25)]
    sampling = Sampling(N_STEPS, guidance_scale, branch)
    shared = sample_rows(pipe, CASE, 0, rows, sampling)
    without_waiting(monkeypatch)
    for row, intervention in enumerate(rows, start=2):
        alone = sample_rows(pipe, CASE, 0, [intervention], sampling)
        effect = rms(alone[2], alone[CORRUPTED])
        assert effect > 1e-8  # of latents of order one: a late change of random weights does little
        assert rms(shared[row], alone[2]) < 1e-6 * effect


def _negated_condition(output):
    """What takes the batch for two equal halves, and sets them apart."""
    uncond, cond = output.chunk(2)
    return torch.cat([uncond, -cond])


def _halved(forward, *arguments, **options):
    return _negated_condition(forward(*arguments, **options))


class HalvedProcessor(AttnProcessor):
    """An attention processor that does."""

    def __call__(self, *arguments, **options):
        return _negated_condition(super().__call__(*arguments, **options))


@pytest.mark.parametrize("kind", ["hook", "processor", "forward"])
def test_what_others_added_sees_equal_halves(shallow_pipe, kind):
    """Not only does every row fit: a user's change of the conditional half alone changes no other rows."""
    attention = shallow_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with contextlib.ExitStack() as stack:
        if kind == "hook":
            hook = attention.register_forward_hook(lambda module, arguments, output: _negated_condition(output))
            stack.callback(hook.remove)
        elif kind == "processor":
            stack.enter_context(mock.patch.object(attention, "processor", HalvedProcessor()))
        else:
            halved = functools.partial(_halved, attention.forward)
            stack.enter_context(mock.patch.object(attention, "forward", halved))
        alone_changed = alone(shallow_pipe, CASE.prompt)
        rows = [Intervention((site,)) for site in mediation.sites(shallow_pipe, network="unet")[:2]]
        latents = [sample_rows(shallow_pipe, CASE, 0, rows[:n_rows], SAMPLING) for n_rows in (1, 2)]
    effect = rms(alone(shallow_pipe, CASE.prompt), alone_changed)
    assert effect > 1e-2
    assert all(rms(rows[CLEAN], alone_changed[0]) < 1e-3 * effect for rows in latents)
