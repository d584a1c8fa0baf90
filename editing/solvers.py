"""Closed-form least squares, in float64: no model code here, only tensors.

Keys are rows here, one per pair; weights, residuals and results follow that order.
"""

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
        up, (d_out, rank), and down, (rank, d_in), float64: D = up @ down.

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
    return _narrowed(up, down)


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


def _narrowed(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product without more columns than its smaller side."""
    d_out, n_columns = up.shape
    d_in = down.shape[1]
    if n_columns <= min(d_out, d_in):
        return up, down
    product = up @ down
    if d_in <= d_out:
        return product, torch.eye(d_in, dtype=product.dtype, device=product.device)
    return torch.eye(d_out, dtype=product.dtype, device=product.device), product
