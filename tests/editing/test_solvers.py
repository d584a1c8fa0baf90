"""The closed form against other routes to the same solution: least squares, gradients, the formula typed anew."""

import dataclasses
import math

import numpy
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from editing.solvers import Statistics, dual_keys, held_out_errors, ridge
from editing.updates import LowRank


@dataclasses.dataclass
class Problem:
    """Random keys, the first of which have residuals; wider and narrower than the number of keys."""

    keys: torch.Tensor
    residuals: torch.Tensor
    weights: torch.Tensor
    regularization: float

    @property
    def n_edited(self) -> int:
        return len(self.residuals)

    @property
    def all_residuals(self) -> torch.Tensor:
        """With the zeros of preserved keys."""
        n_preserved = len(self.keys) - self.n_edited
        return torch.cat([self.residuals, self.residuals.new_zeros(n_preserved, self.residuals.shape[1])])

    def objective(self, change: torch.Tensor) -> torch.Tensor:
        errors = self.keys @ change.T - self.all_residuals
        return (self.weights * errors.square().sum(1)).sum() + self.regularization * change.square().sum()

    def solve(self, **changes) -> torch.Tensor:
        problem = dataclasses.replace(self, **changes)
        up, down = ridge(
            problem.keys, problem.residuals, weights=problem.weights, regularization=problem.regularization
        )
        return up @ down


@st.composite
def problems(draw, max_edited: int = 7) -> Problem:
    size = st.integers(1, 7)
    n_edited, n_preserved = draw(st.integers(1, max_edited)), draw(st.integers(0, 7))
    d_in, d_out = draw(size), draw(size)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    weights = torch.rand(n_edited + n_preserved, generator=random, dtype=torch.float64) * 5 + 0.1
    regularization = draw(st.sampled_from([1e-3, 0.01, 0.5, 20.0]))
    return Problem(normal(n_edited + n_preserved, d_in), normal(n_edited, d_out), weights, regularization)


@given(problems())
def test_it_is_the_least_squares_solution_of_the_stacked_system(problem):
    roots = problem.weights.sqrt()[:, None]
    d_in, d_out = problem.keys.shape[1], problem.residuals.shape[1]
    system = numpy.vstack([roots * problem.keys, math.sqrt(problem.regularization) * numpy.eye(d_in)])
    wanted = numpy.vstack([roots * problem.all_residuals, numpy.zeros((d_in, d_out))])
    expected = scipy.linalg.lstsq(system, wanted)[0].T
    numpy.testing.assert_allclose(problem.solve(), expected, rtol=1e-8, atol=1e-10)


@given(problems())
def test_the_gradient_of_the_objective_is_zero_there_and_only_there(problem):
    def gradient(change: torch.Tensor) -> torch.Tensor:
        change = change.detach().requires_grad_()
        return torch.autograd.grad(problem.objective(change), change)[0]

    change = problem.solve()
    scale = gradient(torch.zeros_like(change)).abs().max()
    assert scale > 0, "there was something to solve"
    assert gradient(change).abs().max() <= 1e-10 * scale


@given(problems())
def test_strong_regularization_leaves_the_matrix_alone(problem):
    # To first order in 1 / lambda the solution is R W K^T / lambda.
    first_order = problem.all_residuals.T @ (problem.weights[:, None] * problem.keys)
    torch.testing.assert_close(problem.solve(regularization=1e10) * 1e10, first_order, rtol=1e-6, atol=1e-6)


def test_weak_regularization_gives_edited_keys_their_residuals_and_preserved_keys_nothing():
    random = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(n, 9, generator=random, dtype=torch.float64) for n in (5, 2))
    up, down = ridge(keys, residuals, regularization=1e-12)
    moved = keys @ (up @ down).T
    torch.testing.assert_close(moved[:2], residuals, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved[2:], torch.zeros(3, 9, dtype=torch.float64), rtol=0, atol=1e-9)


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(problem, random):
    edited = list(range(problem.n_edited))
    preserved = list(range(problem.n_edited, len(problem.keys)))
    random.shuffle(edited)
    random.shuffle(preserved)
    order = edited + preserved
    shuffled = problem.solve(
        keys=problem.keys[order], weights=problem.weights[order], residuals=problem.residuals[edited]
    )
    torch.testing.assert_close(shuffled, problem.solve(), rtol=1e-9, atol=1e-11)


@given(problems())
def test_a_key_given_twice_is_a_key_of_weight_two(problem):
    twice = problem.solve(
        keys=torch.cat([problem.keys[:1], problem.keys]),
        residuals=torch.cat([problem.residuals[:1], problem.residuals]),
        weights=torch.cat([problem.weights[:1], problem.weights]),
    )
    weights = problem.weights.clone()
    weights[0] *= 2
    torch.testing.assert_close(twice, problem.solve(weights=weights), rtol=1e-8, atol=1e-10)


@given(problems())
def test_a_preserved_key_of_weight_zero_is_no_key(problem):
    weights = problem.weights.clone()
    weights[problem.n_edited :] = 0
    without = problem.solve(keys=problem.keys[: problem.n_edited], weights=weights[: problem.n_edited])
    torch.testing.assert_close(problem.solve(weights=weights), without, rtol=1e-8, atol=1e-10)


@given(problems(max_edited=12))
def test_the_rank_is_at_most_the_number_of_edited_keys_and_of_either_side(problem):
    up, down = ridge(problem.keys, problem.residuals, weights=problem.weights, regularization=0.01)
    d_out, d_in = problem.residuals.shape[1], problem.keys.shape[1]
    assert up.shape[1] == down.shape[0] == min(problem.n_edited, max(1, min(d_out, d_in)))
    assert numpy.linalg.matrix_rank(up @ down) <= problem.n_edited


@given(problems(max_edited=4))
def test_one_set_of_dual_keys_serves_every_matrix(problem):
    duals = dual_keys(
        problem.keys, weights=problem.weights, regularization=problem.regularization, n_edited=problem.n_edited
    )
    torch.testing.assert_close(problem.residuals.T @ duals, problem.solve())
    torch.testing.assert_close(-2 * problem.residuals.T @ duals, problem.solve(residuals=-2 * problem.residuals))


@given(problems(max_edited=12), st.integers(0, 6))
def test_sums_give_the_same_solution_however_keys_are_split(problem, cut):
    """Edited and preserved keys are cut where it hurts: some parts have none of either."""
    n, cut = problem.n_edited, min(cut, problem.n_edited)
    rest = [*range(cut, n), *range(n, len(problem.keys))]
    parts = [(range(cut), slice(0, cut)), (rest, slice(cut, n))]
    sums = [
        Statistics.of(problem.keys[list(rows)], problem.residuals[edited], problem.weights[list(rows)])
        for rows, edited in parts
    ]
    total = sums[0] + sums[1]
    up, down = total.solve(regularization=problem.regularization)
    torch.testing.assert_close(up @ down, problem.solve(), rtol=1e-7, atol=1e-8)
    d_out, d_in = problem.residuals.shape[1], problem.keys.shape[1]
    assert up.shape[1] == min(n, d_out, d_in)
    torch.testing.assert_close((sums[1] + sums[0]).solve(regularization=0.5), total.solve(regularization=0.5))


@given(problems())
def test_sums_tell_the_misfit_of_any_change(problem):
    sums = Statistics.of(problem.keys, problem.residuals, problem.weights)
    random = torch.Generator().manual_seed(0)
    for size in (0.0, 1.0):
        change = size * torch.randn(problem.residuals.shape[1], problem.keys.shape[1], generator=random).double()
        misfit = problem.objective(change) - problem.regularization * change.square().sum()
        assert sums.objective(change) == pytest.approx(float(misfit), rel=1e-9)
    assert sums.energy == pytest.approx(sums.objective(torch.zeros_like(change)))


@given(problems(), st.integers(2, 4))
def test_held_out_errors_are_those_of_solutions_without_the_fold(problem, n_folds):
    folds = torch.arange(len(problem.keys)) % n_folds - 1  # those of -1 are never left out
    regularizations = torch.tensor([0.01, 1.0, 30.0])
    found = held_out_errors(
        problem.keys, problem.residuals, folds=folds, regularizations=regularizations, weights=problem.weights
    )
    for regularization, error in zip(regularizations.tolist(), found.tolist(), strict=True):
        expected = 0.0
        for fold in range(n_folds - 1):
            weights = torch.where(folds == fold, 0.0, problem.weights)
            change = problem.solve(weights=weights, regularization=regularization)
            missed = (problem.keys @ change.T - problem.all_residuals)[folds == fold]
            expected += float((problem.weights[folds == fold, None] * missed.square()).sum())
        assert error == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_one_key_by_hand():
    # 10 * 3 / (3^2 + 1) = 3; with weight 4: 4 * 30 / (4 * 9 + 1)
    key, residual = torch.tensor([[3.0]]), torch.tensor([[10.0]])
    up, down = ridge(key, residual, regularization=1.0)
    assert (up @ down).item() == pytest.approx(3.0)
    up, down = ridge(key, residual, regularization=1.0, weights=torch.tensor([4.0]))
    assert (up @ down).item() == pytest.approx(120 / 37)


@pytest.mark.parametrize("regularization", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("n_keys", [40, 100])
def test_nearly_equal_keys_cost_no_accuracy(n_keys, regularization):
    """Templates differ little: these keys lie within 1e-3 of a few directions, of norm about 8."""
    random = numpy.random.default_rng(0)
    centres = random.standard_normal((5, 64))
    keys = centres[numpy.arange(n_keys) % 5] + 1e-3 * random.standard_normal((n_keys, 64))
    residuals = random.standard_normal((n_keys, 16))
    system = numpy.vstack([keys, math.sqrt(regularization) * numpy.eye(64)])
    expected = scipy.linalg.lstsq(system, numpy.vstack([residuals, numpy.zeros((64, 16))]))[0].T
    up, down = ridge(torch.tensor(keys), torch.tensor(residuals), regularization=regularization)
    assert numpy.linalg.norm((up @ down).numpy() - expected) <= 1e-9 * numpy.linalg.norm(expected)


def test_float32_keys_are_solved_in_float64():
    random = torch.Generator().manual_seed(0)
    keys, residuals = torch.randn(6, 4, generator=random), torch.randn(6, 3, generator=random)
    up, down = ridge(keys, residuals, regularization=1e-4)
    assert up.dtype == down.dtype == torch.float64
    exact_up, exact_down = ridge(keys.double(), residuals.double(), regularization=1e-4)
    assert torch.equal(up @ down, exact_up @ exact_down)


_KEYS = torch.eye(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularization": 0.0}, "positive and finite, got 0"),
        ({"regularization": -1.0}, "positive and finite, got -1"),
        ({"regularization": math.inf}, "positive and finite, got inf"),
        ({"regularization": math.nan}, "positive and finite, got nan"),
        ({"regularization": 1e-320, "keys": torch.ones(2, 2)}, "too small for these keys"),
        ({"keys": torch.eye(2) * math.nan}, "keys must be finite"),
        ({"residuals": _KEYS * math.inf}, "residuals must be finite"),
        ({"weights": torch.tensor([1.0, -1.0])}, "at least 0"),
        ({"weights": torch.ones(3)}, r"one weight per key, \(2,\), got \(3,\)"),
        ({"residuals": torch.ones(3, 2)}, "2 keys and 3 residuals"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ridge(**{"keys": _KEYS, "residuals": _KEYS, "regularization": 0.01} | change)


@pytest.mark.parametrize("regularization", ["0.01", None, True])
def test_regularization_must_be_a_number(regularization):
    with pytest.raises(TypeError, match="must be a number"):
        ridge(_KEYS, _KEYS, regularization=regularization)


def test_sums_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        Statistics.of(_KEYS * math.nan, _KEYS).solve(regularization=1.0)
    with pytest.raises(ValueError, match="too small for these keys"):
        Statistics.of(torch.ones(1, 2), torch.ones(1, 2)).solve(regularization=1e-320)


@given(n=st.integers(2, 20), seed=st.integers(0, 1000), regularization=st.sampled_from([1e-2, 1e-4]))
def test_factors_lose_no_more_by_rounding_than_their_product(n, seed, regularization):
    """Keys of padding are nearly alike, and so are their residuals: what is solved for each is long, and cancels."""
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 24, generator=random, dtype=torch.float64)
    keys = keys + 1e-2 * torch.randn(n, 24, generator=random, dtype=torch.float64)
    residuals = torch.randn(1, 30, generator=random, dtype=torch.float64)
    residuals = residuals + 1e-4 * torch.randn(n, 30, generator=random, dtype=torch.float64)
    up, down = ridge(keys, residuals, regularization=regularization)
    stored = LowRank(up, down).dense()
    assert torch.linalg.matrix_norm(stored - up @ down) < 1e-7 * torch.linalg.matrix_norm(up @ down)
    torch.testing.assert_close(down @ down.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
