"""Windows hold something of sampling, told apart by their names; what they hold is the scheduler's to say."""

import diffusers
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediation.rows import Intervention
from mediation.sampling import Sampling, n_iterations, sample_rows
from mediation.windows import check_windows, window_name
from tests.runs import CASE

# some schedulers of diffusers make arrays of tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

N_STEPS = 4
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "multistep": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def use(monkeypatch, pipe, name):
    monkeypatch.setattr(pipe, "scheduler", SCHEDULERS[name].from_config(pipe.scheduler.config))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_iterations_are_counted_as_the_pipeline_counts_them(tiny_pipe, monkeypatch, name):
    use(monkeypatch, tiny_pipe, name)
    tiny_pipe.scheduler.set_timesteps(N_STEPS + 1)
    before = list(tiny_pipe.scheduler.timesteps)
    found = n_iterations(tiny_pipe, N_STEPS)
    assert list(tiny_pipe.scheduler.timesteps) == before  # the pipeline's own scheduler is left alone
    sample_rows(tiny_pipe, CASE, 0, [], Sampling(N_STEPS, guidance_scale=1.0))
    assert found == tiny_pipe.num_timesteps


def test_a_window_between_iterations_is_refused_for_the_scheduler_that_has_none_there(tiny_pipe, monkeypatch):
    between = [(0.26, 0.3)]
    use(monkeypatch, tiny_pipe, "ddim")
    with pytest.raises(ValueError, match=r"nothing happens in the window \(0\.26, 0\.3\).*4 iterations are at 0, 1/4"):
        check_windows(tiny_pipe, between, N_STEPS)
    use(monkeypatch, tiny_pipe, "heun")  # iterates twice a step but for the last one: 2/7 is in the window
    assert check_windows(tiny_pipe, between, N_STEPS) == ((0.26, 0.3),)


@given(st.integers(1, 12), st.data())
def test_a_window_is_taken_if_and_only_if_an_iteration_begins_in_it(tiny_pipe, n_steps, data):
    start, stop = sorted(data.draw(st.lists(st.integers(0, 24), min_size=2, max_size=2, unique=True)))
    begins = [start * n_steps <= 24 * i < stop * n_steps for i in range(n_steps)]  # in exact arithmetic
    if any(begins):
        assert check_windows(tiny_pipe, [(start / 24, stop / 24)], n_steps) == ((start / 24, stop / 24),)
    else:
        with pytest.raises(ValueError, match="nothing happens"):
            check_windows(tiny_pipe, [(start / 24, stop / 24)], n_steps)


@pytest.mark.parametrize(("name", "n"), [("ddim", 4), ("pndm", 13), ("heun", 7)])
def test_each_is_a_window_for_every_iteration(tiny_pipe, monkeypatch, name, n):
    use(monkeypatch, tiny_pipe, name)
    windows = check_windows(tiny_pipe, "each", N_STEPS)
    assert windows == tuple((i / n, (i + 1) / n) for i in range(n))
    for i in range(n):
        assert [Intervention(window=window).covers(i / n) for window in windows] == [i == j for j in range(n)]


def test_arrays_are_windows_too(tiny_pipe):
    found = check_windows(tiny_pipe, numpy.array([[0.0, 0.5], [0.5, 1.0]]), 2)
    assert found == ((0, 0.5), (0.5, 1))
    assert list(map(window_name, found)) == ["0–0.5", "0.5–1"]


@pytest.mark.parametrize(
    ("windows", "error", "message"),
    [
        ("all", ValueError, 'windows is "each"'),
        ([], ValueError, "windows is empty"),
        ([(0.5, 0.5)], ValueError, "a window is"),
        ([(0, float("nan"))], ValueError, "a window is"),
        ([(0, 0.5), (0.5, 1), (0, 0.5)], ValueError, "given twice: 0–0.5"),
        ([(0, 1 / 3), (0, 0.33333333)], ValueError, "given twice: 0–0.333333"),
        ((0, 0.5), TypeError, r"\(start, stop\) fractions of sampling, as \[\(0, 0.5\)\]; got 0"),
        ([(0, 0.5, 1)], TypeError, "fractions of sampling"),
        (0.5, TypeError, "got 0.5"),
        ([("0", "half")], TypeError, "got"),
    ],
)
def test_what_is_no_window_is_named(tiny_pipe, windows, error, message):
    with pytest.raises(error, match=message):
        check_windows(tiny_pipe, windows, 4)
