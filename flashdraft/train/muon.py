"""Muon: a matrix moves by its momentum with all singular values set to about one.

Jordan et al., 2024 (kellerjordan.github.io/posts/muon), scaled as in 2502.16982 (section 2.2), so
that it takes AdamW's learning rate and decay. `torch.optim.Muon` with these settings takes the same
steps, but multiplies in bfloat16 everywhere: on a CPU without such products that is many times
slower (docs/log.md). Does not know which parameters it should have (`optimizers.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Muon", "has_native_bf16"]

_MOMENTUM = 0.95
_ITERATIONS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: the steepest at zero
_SMALLEST_NORM = 1e-7


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled decay, for matrices alone."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient.

        Raises ValueError for a closure, which no step of ours needs.
        """
        if closure is not None:
            raise ValueError("Muon's step takes no closure")
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, group)

    def _move(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = matrix.grad
        assert gradient is not None
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(momentum, _MOMENTUM)

        direction = _orthogonalised(ahead)
        size_of_adamw = 0.2 * math.sqrt(max(matrix.shape))
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(direction, alpha=-group["lr"] * size_of_adamw)


def _orthogonalised(matrix: Tensor) -> Tensor:
    """Newton and Schulz's iteration: singular vectors stay, their values go to 0.7 to 1.2.

    The result is in the dtype of its products.
    """
    dtype = torch.bfloat16 if has_native_bf16(matrix.device) else torch.float32
    is_tall = matrix.size(0) > matrix.size(1)
    wide = matrix.T if is_tall else matrix
    wide = wide.to(dtype)
    wide = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    linear, cubic, quintic = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        update = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        wide = torch.addmm(wide, update, wide, beta=linear)
    return wide.T if is_tall else wide


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False
