"""How strongly a solution is held back: an absolute lambda, one in units of the keys, or one found without images."""

import dataclasses
from typing import Literal

import torch

from editing.associations import Associations
from editing.pairing import TokenPairs
from editing.solvers import check_regularization, held_out_errors

AUTO = "auto"
# what "auto" chooses from, in units of the keys
_FACTORS = torch.logspace(-6, 2, 17, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Relative:
    """Lambda in units of the keys: `factor` times the mean eigenvalue of their Gram matrix, trace(K W K^T) / d_in.

    The same factor then means the same for encoders of any width and scale, and for any number of concepts.

    Raises:
        TypeError: if `factor` is no number.
        ValueError: if it is not positive and finite.

    Example:
        >>> Relative(0.1).value(trace=25.0, d_in=2)
        1.25
    """

    factor: float

    def __post_init__(self):
        object.__setattr__(self, "factor", check_regularization(self.factor))

    def value(self, trace: float, d_in: int) -> float:
        """The lambda that this is for keys of width d_in, the weighted squares of whose norms sum up to `trace`."""
        return self.factor * trace / d_in


Regularization = float | Relative | Literal["auto"]


def checked_lambda(regularization: Regularization, *found: TokenPairs) -> Regularization:
    """Returns what a user passed as `regularization`, or says why it is none, or none for these pairs.

    Raises:
        TypeError: if it is neither a number nor `Relative` nor "auto".
        ValueError: if it is not positive and finite, or "auto" is asked for while all templates start alike.
    """
    if regularization == AUTO and any(len(pairs.folds[pairs.folds >= 0].unique()) < 2 for pairs in found):
        raise ValueError(
            'regularization="auto" leaves out the templates that start with the same words, and tries the solution in'
            ' them: pass at least two with different words before "{}", such as "{}" and "a photo of {}"'
        )
    if regularization == AUTO or isinstance(regularization, Relative):
        return regularization
    return check_regularization(regularization)


def choose_lambda(regularization: Regularization, known: Associations) -> tuple[float, dict]:
    """The lambda for these associations, and how it came about, ready for a report.

    "auto" solves without each fold in turn, the templates with the same words before the concept, and adds up how far
    the solution misses the wanted values in it: those of edited concepts and, where it should do nothing, those of
    preserved ones. It takes the lambda with the smallest sum, and the largest of equals. The report gives the sums
    relative to doing nothing, as ratios of norms.
    """
    keys, weights = known.keys, known.pairs.weights
    trace = float(keys.square().sum(1) @ weights)
    if isinstance(regularization, Relative):
        value = regularization.value(trace, keys.shape[1])
        return value, {"lambda": value, "relative": regularization.factor}
    if regularization != AUTO:
        return regularization, {"lambda": regularization}
    candidates = _FACTORS * Relative(1.0).value(trace, keys.shape[1])
    errors = held_out_errors(
        keys, known.residuals, folds=known.pairs.folds, regularizations=candidates, weights=weights
    )
    best = int(torch.nonzero(errors <= errors.min() * (1 + 1e-9)).max())
    unedited = known.residuals.square().sum(1) @ weights[: known.pairs.n_edited]
    return float(candidates[best]), {
        "lambda": float(candidates[best]),
        "relative": float(_FACTORS[best]),
        "candidates": candidates.tolist(),
        "held_out_errors": (errors / unedited.clamp(min=torch.finfo(errors.dtype).tiny)).sqrt().tolist(),
    }


def describe_lambda(regularization: Regularization) -> float | str | dict[str, float]:
    """What a user passed, as plain JSON."""
    return {"relative": regularization.factor} if isinstance(regularization, Relative) else regularization
