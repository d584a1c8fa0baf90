"""Muon: momentum whose matrices are made nearly orthogonal before they are stepped along.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), https://kellerjordan.github.io/posts/muon.
torch has one, for matrices in bfloat16. This one orthogonalises in the precision that the processor is fast in, and
takes convolution kernels, which it reads as matrices (out, in · height · width).
"""

from collections.abc import Iterable

import torch

from benchmarks.emoji.training import BFLOAT16_IS_FAST

# Of the odd quintic that is iterated: the larger the slope at 0, the fewer iterations bring singular values near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_N_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, decoupled weight decay, updates as large as AdamW's (RMS 0.2)."""

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Steps every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(average, group["momentum"]).flatten(1)
                size = 0.2 * max(direction.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalised(direction).view_as(weight), alpha=-group["lr"] * size)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values brought near 1, by five iterations of Newton and Schulz."""
    x = matrix.bfloat16() if BFLOAT16_IS_FAST else matrix
    x = x / x.norm().clamp(min=1e-7)
    if len(x) > x.shape[1]:
        x = x.T
    for _ in range(_N_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x if x.shape == matrix.shape else x.T).to(matrix.dtype)
