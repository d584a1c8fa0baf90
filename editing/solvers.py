"""Closed-form least squares, in float64: no model code here, only tensors.

Keys are rows here, one per pair; weights, residuals and results follow that order.
"""

import dataclasses
import math
import numbers

import torch


def check_regularization(regularization: float) -> float:
    """Returns `regularization` as a float, or says why it cannot be one.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is not positive and finite.
    """
    if not isinstance(regularization, numbers.Real) or isinstance(regularization, bool):
        raise TypeError(f"regularization must be a number, got {regularization!r}")
    if not (math.isfinite(regularization) and regularization > 0):
        raise ValueError(f"regularization must be positive and finite, got {regularization}: the paper uses 0.01")
    return float(regularization)


def dual_keys(
    keys: torch.Tensor, *, regularization: float, weights: torch.Tensor | None = None, n_edited: int | None = None
) -> torch.Tensor:
    """The part of a ridge solution that depends on the keys alone: rows of (Lambda + K^T K)^-1 K^T.

    The solution for residuals R, one column per key, is R @ dual_keys. Any number of matrices that read the same keys
    share one call. Keys whose residual is zero (preserved ones) need no row: put them last and give `n_edited`.

    Args:
        keys: (key, d_in).
        regularization: lambda > 0; Lambda is the diagonal of lambda / weight.
        weights: (key,), at least 0; None is 1 for each.
        n_edited: how many of the first keys get a row; None is all of them.

    Returns:
        (n_edited, d_in), float64.

    Raises:
        ValueError: if shapes disagree, something is not finite, or the system is singular in float64.

    Example:
        >>> dual_keys(torch.tensor([[3.0, 0.0]]), regularization=1.0)
        tensor([[0.3000, 0.0000]], dtype=torch.float64)
    """
    regularization = check_regularization(regularization)
    n_keys, d_in = keys.shape
    n_edited = n_keys if n_edited is None else n_edited
    keys = keys.to(torch.float64)
    weights = keys.new_ones(n_keys) if weights is None else weights.to(keys)
    if weights.shape != (n_keys,):
        raise ValueError(f"expected one weight per key, ({n_keys},), got {tuple(weights.shape)}")
    if not (torch.isfinite(keys).all() and torch.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("keys must be finite, and weights finite and at least 0")
    # Scaling by sqrt(weight) on both sides keeps the system symmetric, and defined at weight 0.
    roots = weights.sqrt()[:, None]
    scaled = roots * keys
    if n_keys <= d_in:
        solved = torch.cholesky_solve(scaled, _factor(scaled @ scaled.T, regularization))[:n_edited]
    else:  # the same rows by the push-through identity, from a system of the keys' width
        solved = torch.cholesky_solve(scaled[:n_edited].T, _factor(scaled.T @ scaled, regularization)).T
    return roots[:n_edited] * solved


def ridge(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    *,
    regularization: float,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change D of a matrix that minimises sum_i w_i ||D k_i - r_i||^2 + lambda ||D||^2, as two factors.

    D = R (Lambda + K^T K)^-1 K^T. The first `len(residuals)` keys are edited; those behind them are preserved, which
    is a residual of zero. Hence D has rank at most `len(residuals)`, whatever is preserved.

    Args:
        keys: (key, d_in), the edited ones first.
        residuals: (edited key, d_out), what is wanted of the matrix minus what it gives.
        regularization: lambda > 0.
        weights: (key,), at least 0; None is 1 for each.

    Returns:
        up, (d_out, rank), and down, (rank, d_in), float64: D = up @ down, with rows of `down` as of `orthonormal`.

    Raises:
        ValueError: if shapes disagree, something is not finite, or the system is singular in float64.

    Example:
        >>> up, down = ridge(torch.tensor([[3.0, 0.0]]), torch.tensor([[10.0]]), regularization=1.0)
        >>> up @ down
        tensor([[3., 0.]], dtype=torch.float64)
    """
    if len(residuals) > len(keys):
        raise ValueError(f"expected a key for each residual, got {len(keys)} keys and {len(residuals)} residuals")
    residuals = residuals.to(torch.float64)
    if not torch.isfinite(residuals).all():
        raise ValueError("residuals must be finite")
    up = residuals.T
    down = dual_keys(keys, regularization=regularization, weights=weights, n_edited=len(residuals))
    return narrowed(*orthonormal(up, down))


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """All that a ridge solution depends on, however many keys there were: sums of moments, which add.

    Attributes:
        gram: (d_in, d_in), sum of w k k^T over all keys, float64.
        cross: (d_out, d_in), sum of w r k^T over edited keys, float64.
        energy: sum of w ||r||^2.
        n_edited: edited keys so far, which bound the rank of the solution.

    Example:
        >>> one = Statistics.of(torch.tensor([[3.0, 0.0]]), torch.tensor([[10.0]]))
        >>> up, down = (one + one).solve(regularization=2.0)
        >>> (up @ down).round(decimals=6)
        tensor([[3., 0.]], dtype=torch.float64)
    """

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float
    n_edited: int

    @classmethod
    def of(cls, keys: torch.Tensor, residuals: torch.Tensor, weights: torch.Tensor | None = None) -> "Statistics":
        """Sums over some keys; arguments as for `ridge`."""
        keys, residuals = keys.to(torch.float64), residuals.to(torch.float64)
        weighted = keys if weights is None else weights.to(keys)[:, None] * keys
        n_edited = len(residuals)
        squares = residuals.square().sum(1)
        energy = float(squares.sum() if weights is None else squares @ weights[:n_edited].to(squares))
        return cls(weighted.T @ keys, residuals.T @ weighted[:n_edited], energy, n_edited)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Sums over the keys of both."""
        energy, n_edited = self.energy + other.energy, self.n_edited + other.n_edited
        return Statistics(self.gram + other.gram, self.cross + other.cross, energy, n_edited)

    def solve(self, *, regularization: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The same change as `ridge` gives for all keys at once, as factors.

        Raises:
            ValueError: if something is not finite, or the system is singular in float64.
        """
        regularization = check_regularization(regularization)
        if not (torch.isfinite(self.gram).all() and torch.isfinite(self.cross).all()):
            raise ValueError("keys, residuals and weights must be finite")
        change = torch.cholesky_solve(self.cross.T, _factor(self.gram.clone(), regularization)).T
        if self.n_edited >= min(change.shape):
            return narrowed(change, torch.eye(change.shape[1], dtype=change.dtype))
        up, scales, down = torch.linalg.svd(change, full_matrices=False)
        return up[:, : self.n_edited] * scales[: self.n_edited], down[: self.n_edited]

    def objective(self, change: torch.Tensor) -> float:
        """sum_i w_i ||D k_i - r_i||^2 of a change D; at 0, the energy."""
        return max(0.0, self.energy + float(((change @ self.gram - 2 * self.cross) * change).sum()))


def held_out_errors(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    *,
    folds: torch.Tensor,
    regularizations: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_i w_i ||D_i k_i - r_i||^2, where D_i is the ridge solution without the keys of the fold that k_i is in.

    Args:
        keys: (key, d_in), the edited ones first.
        residuals: (edited key, d_out).
        folds: (key,), integers; keys of a negative fold are in every solution, and in no sum.
        regularizations: (n,), each above 0.
        weights: (key,), at least 0; None is 1 for each.

    Returns:
        (n,), float64.

    Example:
        >>> keys, residuals = torch.tensor([[3.0], [3.0]]), torch.tensor([[10.0], [10.0]])
        >>> errors = held_out_errors(keys, residuals, folds=torch.tensor([0, 1]), regularizations=torch.tensor([1.0]))
        >>> errors.round(decimals=6)
        tensor([2.], dtype=torch.float64)
    """
    keys = keys.to(torch.float64)
    wanted = keys.new_zeros(len(keys), residuals.shape[1])
    wanted[: len(residuals)] = residuals
    roots = keys.new_ones(len(keys), 1) if weights is None else weights.to(keys).sqrt()[:, None]
    keys, wanted = roots * keys, roots * wanted
    errors = keys.new_zeros(len(regularizations))
    for fold in folds[folds >= 0].unique():
        out = folds == fold
        # One decomposition serves every regularization.
        left, scales, right = torch.linalg.svd(keys[~out], full_matrices=False)
        answers, projected = keys[out] @ right.T, left.T @ wanted[~out]
        for i, regularization in enumerate(regularizations.tolist()):
            gains = scales / (scales.square() + regularization)
            errors[i] += (answers @ (gains[:, None] * projected) - wanted[out]).square().sum()
    return errors


def _factor(gram: torch.Tensor, regularization: float) -> torch.Tensor:
    gram.diagonal().add_(regularization)
    factor, problem = torch.linalg.cholesky_ex(gram)
    # A pivot at the level of rounding passes the factorisation, and makes what follows noise.
    noise = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    if problem or factor.diagonal().square().min() <= noise:
        raise ValueError(
            f"regularization {regularization} is too small for these keys: the system is singular in float64"
        )
    return factor


def orthonormal(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product with orthonormal rows of `down`, if that has no more rows than columns.

    Of keys that are nearly alike, solutions are long and cancel in the product: rounded to float32, as edits are, the
    factors would lose more than the product does. These lose no more.
    """
    if len(down) > down.shape[1]:
        return up, down
    rotation, triangle = torch.linalg.qr(down.T)
    return up @ triangle.T, rotation.T


def narrowed(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the same product, of no more columns than its smaller side."""
    d_out, n_columns = up.shape
    d_in = down.shape[1]
    if n_columns <= min(d_out, d_in):
        return up, down
    product = up @ down
    if d_in <= d_out:
        return product, torch.eye(d_in, dtype=product.dtype, device=product.device)
    return torch.eye(d_out, dtype=product.dtype, device=product.device), product
