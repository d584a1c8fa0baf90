"""What an edit does to one parameter, as a value."""

import dataclasses

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

    def dense(self) -> torch.Tensor:
        """The change itself, (d_out, d_in), float64."""
        return self.up.double() @ self.down.double()

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
        if self.shape != other.shape:
            raise ValueError(f"cannot add changes of shapes {self.shape} and {other.shape}")
        return LowRank(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down]))
