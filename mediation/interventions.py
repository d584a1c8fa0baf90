"""Interventions on the rows of a batch: pure functions of the rows and of the clean row among them."""

from collections.abc import Mapping, Sequence

import torch


def restore(rows: torch.Tensor, clean: int, copies: Mapping[int, Sequence[tuple[int, int]] | None]) -> torch.Tensor:
    """Copies the clean row's activation into other rows.

    Args:
        rows: activations, (row, …); where tokens are paired, (row, token, …).
        clean: index of the clean row.
        copies: for each row to change, the (clean position, position in that row) of each token to copy; None copies
            the whole row.

    Returns:
        A new tensor.

    Example:
        >>> restore(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), clean=0, copies={1: [(0, 1)]})
        tensor([[1., 2.],
                [3., 1.]])
    """
    rows = rows.clone()
    for row, pairs in copies.items():
        if pairs is None:
            rows[row] = rows[clean]
        elif pairs:
            source, target = map(list, zip(*pairs, strict=True))
            rows[row, target] = rows[clean, source]
    return rows


def add(rows: torch.Tensor, chosen: Sequence[int], positions: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Adds `values`, (position, …), to the given token positions of the chosen rows.

    Example:
        >>> add(torch.zeros(2, 2, 1), chosen=[1], positions=[0], values=torch.ones(1, 1)).flatten().tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    rows = rows.clone()
    for row in chosen:
        rows[row, list(positions)] += values.to(rows)
    return rows
