"""What draft networks and targets are made of: linears, RMSNorm, rotary positions. Knows tensors and weights only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import native

__all__ = ["ROPE_TYPES", "Linear", "RMSNorm", "TorchLinear", "apply_rotary", "pack", "rotary_table"]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # static: a position's angles do not depend on the length


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension, in the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class TorchLinear:
    """x -> x @ weight.T + bias where no native linear can be had. Not row-exact: torch chooses a kernel by the number of rows."""

    row_exact, format = False, "torch"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias, self.nbytes = weight, bias, weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        return F.linear(x, self.weight, self.bias)


Linear = TorchLinear | native.NativeLinear


def pack(weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact") -> Linear:
    """A native linear where one can be had (`kernel`: NativeLinear's), else torch's."""
    if native.usable(weight) and weight.shape[1] % native.PANEL == 0:
        return native.NativeLinear(weight, bias, kernel=kernel)
    return TorchLinear(weight, bias)


def rotary_table(inv_freq: Tensor, num_positions: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` takes, for every position: cos and signed sin, [positions, head_dim] each."""
    angles = torch.outer(torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32), inv_freq.float())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., heads, head_dim]; cos, sin: [..., 1, head_dim] of `rotary_table` (RoFormer 2104.09864, half-split layout)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
