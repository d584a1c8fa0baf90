"""What an edit does to one parameter, as a value."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """The change up @ down of a weight matrix.

    Attributes:
        up: (d_out, rank), float32 on the CPU.
        down: (rank, d_in), float32 on the CPU.

    Raises:
        ValueError: if these are no finite matrices that can be multiplied.

    Example:
        >>> LowRank(torch.ones(3, 1), torch.ones(1, 2)).scaled(2.0).dense().tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    up: torch.Tensor
    down: torch.Tensor

    def __post_init__(self):
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            shapes = f"{tuple(self.up.shape)} and {tuple(self.down.shape)}"
            raise ValueError(f"factors must be (d_out, rank) and (rank, d_in), got {shapes}")
        for name in ("up", "down"):
            factor = getattr(self, name).detach().to("cpu", torch.float32).contiguous()
            if not torch.isfinite(factor).all():
                raise ValueError(f"the factor `{name}` is not finite")
            object.__setattr__(self, name, factor)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the parameter that this changes, (d_out, d_in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of the factors: the rank of the change is at most this."""
        return self.down.shape[0]

    @property
    def extent(self) -> dict[str, int]:
        """How much of the parameter this changes, for reports."""
        return {"rank": self.rank}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of this."""
        return {"up": self.up, "down": self.down}

    def dense(self) -> torch.Tensor:
        """The change itself, (d_out, d_in), float64."""
        return self.up.double() @ self.down.double()

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter with the change, float64."""
        return weight.double() + self.dense()

    def times(self, keys: torch.Tensor) -> torch.Tensor:
        """The change of the values of `keys`: (key, d_in) -> (key, d_out), float64."""
        return keys.double() @ self.down.double().T @ self.up.double().T

    def norm(self) -> float:
        """Frobenius norm of the change, from the factors alone."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def scaled(self, factor: float) -> "LowRank":
        """`factor` times the change."""
        return LowRank(self.up * factor, self.down)

    def compressed(self, rank: int) -> "LowRank":
        """The nearest change of at most this rank in Frobenius norm, from the factors alone (Eckart and Young 1936).

        Its factors are balanced: both are as long as the square root of the change, which suits half precision.
        """
        left, inner_left = torch.linalg.qr(self.up.double())
        right, inner_right = torch.linalg.qr(self.down.double().T)
        up, scales, down = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
        roots = scales[:rank].sqrt()
        return LowRank(left @ (up[:, :rank] * roots), (roots[:, None] * down[:rank]) @ right.T)

    def __add__(self, other: "LowRank") -> "LowRank":
        """Both changes at once, of the sum of their ranks."""
        if not isinstance(other, LowRank):
            return NotImplemented
        _check_same_shape(self, other)
        return LowRank(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down]))


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """The change of single weights of a parameter of any shape: something is added to them, or they are taken away.

    Attributes:
        shape: of the parameter.
        indices: (change,), ascending positions in the flattened parameter, int64 on the CPU.
        values: (change,), what is added there, float32 on the CPU.
        shares: (change,), where not 0, how much is taken of whatever weight is there, float64 on the CPU: 1 sets it to
            0, and the value is what that adds to the weight as it was scored. None is 0 throughout.

    Raises:
        ValueError: if indices are out of order or range, or there is not one finite value and share for each.

    Example:
        >>> Sparse((2, 2), torch.tensor([1, 2]), torch.tensor([5.0, -1.0])).dense().tolist()
        [[0.0, 5.0], [-1.0, 0.0]]
        >>> third = Sparse((2,), torch.tensor([0]), torch.tensor([-1 / 3]), torch.ones(1))
        >>> (third + third).changed(torch.tensor([1 / 3, 2.0])).tolist()
        [0.0, 2.0]
    """

    shape: tuple[int, ...]
    indices: torch.Tensor
    values: torch.Tensor
    shares: torch.Tensor | None = None

    def __post_init__(self):
        shape = tuple(int(size) for size in self.shape)
        indices = self.indices.detach().to("cpu", torch.int64).contiguous()
        values = self.values.detach().to("cpu", torch.float32).contiguous()
        shares = torch.zeros(len(indices)) if self.shares is None else self.shares
        shares = shares.detach().to("cpu", torch.float64).contiguous()
        if indices.ndim != 1 or not indices.shape == values.shape == shares.shape:
            shapes = f"{tuple(indices.shape)}, {tuple(values.shape)} and {tuple(shares.shape)}"
            raise ValueError(f"expected indices, values and shares (change,), one of each for each index, got {shapes}")
        if len(indices) and not (indices[0] >= 0 and indices[-1] < math.prod(shape) and (indices.diff() > 0).all()):
            raise ValueError(f"indices must ascend from 0 to at most {math.prod(shape) - 1}, the last of shape {shape}")
        if not (torch.isfinite(values).all() and torch.isfinite(shares).all()):
            raise ValueError("the values or the shares are not finite")
        for name, value in (("shape", shape), ("indices", indices), ("values", values), ("shares", shares)):
            object.__setattr__(self, name, value)

    @property
    def extent(self) -> dict[str, int]:
        """How much of the parameter this changes, for reports."""
        return {"n_changed": len(self.indices)}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of this."""
        narrow = torch.int32 if math.prod(self.shape) <= torch.iinfo(torch.int32).max else torch.int64
        tensors = {"indices": self.indices.to(narrow), "values": self.values}
        if self.shares.any():
            tensors["shares"] = self.shares[:1] if (self.shares == self.shares[0]).all() else self.shares
        return tensors

    def dense(self) -> torch.Tensor:
        """The change itself, in the parameter's shape, float64."""
        flat = torch.zeros(math.prod(self.shape), dtype=torch.float64)
        flat[self.indices] = self.values.double()
        return flat.view(self.shape)

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter with the change, float64."""
        flat = weight.flatten().double()
        old = flat[self.indices]
        new = torch.where(self.shares == 0, old + self.values, old * (1 - self.shares))
        return flat.index_copy(0, self.indices, new).view(self.shape)

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(torch.linalg.vector_norm(self.values.double()))

    def scaled(self, factor: float) -> "Sparse":
        """`factor` times the change."""
        return Sparse(self.shape, self.indices, self.values * factor, self.shares * factor)

    def __add__(self, other: "Sparse | LowRank") -> "Sparse | Mixed":
        """Both changes at once: of what one leaves of a weight, the other takes its share; else values are summed."""
        if isinstance(other, LowRank):
            return Mixed(other, self)
        if not isinstance(other, Sparse):
            return NotImplemented
        _check_same_shape(self, other)
        indices, places = torch.cat([self.indices, other.indices]).unique(return_inverse=True)
        values, shares = torch.zeros(2, 2, len(indices), dtype=torch.float64)
        sides = torch.arange(2).repeat_interleave(torch.tensor([len(self.indices), len(other.indices)]))
        values[sides, places] = torch.cat([self.values, other.values]).double()
        shares[sides, places] = torch.cat([self.shares, other.shares])
        values[(shares == 0) & (shares.flip(0) != 0)] = 0  # nothing is added to what is taken away
        mine, others = 1 - shares
        return Sparse(self.shape, indices, values[0] + mine * values[1], 1 - mine * others)

    __radd__ = __add__  # sums commute


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A low-rank change of a matrix and one of its single weights, at once: what is taken away goes before it is added.

    Example:
        >>> mixed = LowRank(torch.ones(2, 1), torch.ones(1, 2)) + Sparse((2, 2), torch.tensor([3]), torch.tensor([4.0]))
        >>> mixed.dense().tolist()
        [[1.0, 1.0], [1.0, 5.0]]
    """

    low_rank: LowRank
    sparse: Sparse

    def __post_init__(self):
        _check_same_shape(self.low_rank, self.sparse)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the parameter that this changes, (d_out, d_in)."""
        return self.low_rank.shape

    @property
    def extent(self) -> dict[str, int]:
        """How much of the parameter this changes, for reports."""
        return self.low_rank.extent | self.sparse.extent

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds of this."""
        return self.low_rank.tensors | self.sparse.tensors

    def dense(self) -> torch.Tensor:
        """The change itself, (d_out, d_in), float64."""
        return self.low_rank.dense() + self.sparse.dense()

    def changed(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter with the change, float64."""
        return self.low_rank.changed(self.sparse.changed(weight))

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(torch.linalg.vector_norm(self.dense()))

    def scaled(self, factor: float) -> "Mixed":
        """`factor` times the change."""
        return Mixed(self.low_rank.scaled(factor), self.sparse.scaled(factor))

    def __add__(self, other: "Update") -> "Mixed":
        """Both changes at once."""
        if isinstance(other, LowRank):
            return Mixed(self.low_rank + other, self.sparse)
        if isinstance(other, Sparse):
            return Mixed(self.low_rank, self.sparse + other)
        if isinstance(other, Mixed):
            return Mixed(self.low_rank + other.low_rank, self.sparse + other.sparse)
        return NotImplemented

    __radd__ = __add__  # sums commute


Update = LowRank | Sparse | Mixed


def assemble(shape: Sequence[int], tensors: Mapping[str, torch.Tensor], *, share: float = 0.0) -> Update:
    """The update of a parameter of this shape that has these `tensors`; `share` is for those that tell none.

    Example:
        >>> assemble((2,), Sparse((2,), torch.tensor([0]), torch.tensor([7.0])).tensors).dense().tolist()
        [7.0, 0.0]
    """
    low_rank = LowRank(tensors["up"], tensors["down"]) if "up" in tensors else None
    shares = tensors.get("shares", torch.tensor([share])).expand(len(tensors.get("indices", ())))
    sparse = Sparse(tuple(shape), tensors["indices"], tensors["values"], shares) if "indices" in tensors else None
    return Mixed(low_rank, sparse) if low_rank and sparse else low_rank or sparse


def merged_extent(extents: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The largest rank and the number of all single weights among several parameters' changes."""
    merged: dict[str, int] = {}
    for extent in extents:
        if "rank" in extent:
            merged["rank"] = max(extent["rank"], merged.get("rank", 0))
        if "n_changed" in extent:
            merged["n_changed"] = extent["n_changed"] + merged.get("n_changed", 0)
    return merged


def describe_extent(extent: Mapping[str, int]) -> str:
    """An extent in words; that of no update at all is of rank 0.

    Example:
        >>> describe_extent({"rank": 4, "n_changed": 1})
        'rank 4, 1 weight'
    """
    words = [] if "n_changed" in extent and "rank" not in extent else [f"rank {extent.get('rank', 0)}"]
    if "n_changed" in extent:
        words.append(f"{extent['n_changed']:,} weight{'' if extent['n_changed'] == 1 else 's'}")
    return ", ".join(words)


def _check_same_shape(a: Update, b: Update) -> None:
    if a.shape != b.shape:
        raise ValueError(f"cannot add changes of shapes {a.shape} and {b.shape}")
