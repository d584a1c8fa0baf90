"""Interventions on the rows of a batch: pure functions of the rows."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Copy(NamedTuple):
    """An activation that one row takes from another.

    Attributes:
        source: the row that gives.
        target: the row that takes.
        pairs: (position in the source, position in the target) of each token to copy; None copies all positions.
        features: the part of the last dimension to copy.
    """

    source: int
    target: int
    pairs: tuple[tuple[int, int], ...] | None = None
    features: slice = slice(None)


def restore(rows: torch.Tensor, copies: Iterable[Copy]) -> torch.Tensor:
    """Copies activations between rows; sources are read as they were.

    Args:
        rows: activations, (row, …); where tokens are paired, (row, token, feature).
        copies: what goes where.

    Returns:
        A new tensor.

    Example:
        >>> rows = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
        >>> restore(rows, [Copy(source=0, target=1, pairs=((0, 1),))]).flatten().tolist()
        [1.0, 2.0, 3.0, 1.0]
    """
    changed = rows.clone()
    for copy in copies:
        if copy.pairs is None:
            changed[copy.target, ..., copy.features] = rows[copy.source, ..., copy.features]
        elif copy.pairs:
            source, target = map(list, zip(*copy.pairs, strict=True))
            changed[copy.target, target, copy.features] = rows[copy.source, source, copy.features]
    return changed


def first_order(
    gradient: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    pairs: tuple[tuple[int, int], ...] | None = None,
    features: slice = slice(None),
) -> torch.Tensor:
    """What `restore` would change of a number, to first order: <gradient, restored − target>.

    Args:
        gradient: of the number with respect to the target row's activation.
        source: activation of the row that gives; no row dimension.
        target: activation of the row that takes.
        pairs: as of `Copy`.
        features: as of `Copy`.

    Returns:
        A scalar, in float32 or wider.

    Example:
        >>> first_order(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 1.0]), torch.zeros(2), features=slice(1)).item()
        2.0
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    if pairs is None:
        change = source[..., features].to(wide) - target[..., features].to(wide)
        return (gradient[..., features].to(wide) * change).sum()
    restored = restore(torch.stack([source, target]), [Copy(0, 1, pairs, features)])[1]
    return (gradient.to(wide) * (restored.to(wide) - target.to(wide))).sum()


def zero(
    rows: torch.Tensor, chosen: Iterable[int], positions: Sequence[int], features: slice = slice(None)
) -> torch.Tensor:
    """Sets the given token positions and features of the chosen rows to zero.

    Example:
        >>> zero(torch.ones(2, 2, 1), chosen=[1], positions=[0]).flatten().tolist()
        [1.0, 1.0, 0.0, 1.0]
    """
    changed = rows.clone()
    for row in chosen:
        changed[row, list(positions), features] = 0
    return changed


def add(
    rows: torch.Tensor,
    chosen: Iterable[int],
    positions: Sequence[int],
    values: torch.Tensor,
    features: slice = slice(None),
) -> torch.Tensor:
    """Adds `values`, (position, feature), to the given token positions and features of the chosen rows.

    Example:
        >>> add(torch.zeros(2, 2, 1), chosen=[1], positions=[0], values=torch.ones(1, 1)).flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    changed = rows.clone()
    for row in chosen:
        changed[row, list(positions), features] += values.to(rows)
    return changed
