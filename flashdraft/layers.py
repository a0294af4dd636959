"""What draft networks and targets are made of: packed linears, RMSNorm, rotary positions. Knows tensors and weights only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import native

__all__ = ["Linear", "PackedLinear", "RMSNorm", "apply_rotary", "pack", "rotary_table"]

_PACK_HINT = 16  # the batch size that oneDNN packs weights for


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension, in the weight's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class PackedLinear:
    """x -> x @ weight.T + bias where no native linear can be had: packed once by oneDNN (float32, CPU), else F.linear."""

    row_exact = False  # the libraries choose a kernel by the number of rows

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.nbytes, self.bias = weight.nbytes, bias
        known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        self.format = "oneDNN" if known and weight.dtype == torch.float32 and weight.device.type == "cpu" else "torch"
        packed = self.format == "oneDNN"
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_HINT) if packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        if self.format == "torch":
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return out


Linear = PackedLinear | native.NativeLinear


def pack(weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact") -> Linear:
    """A native linear where one can be had (`kernel`: decoder.KERNELS), else oneDNN's or torch's."""
    if native.usable(weight) and weight.shape[1] % native.PANEL == 0:
        return native.NativeLinear(weight, bias, format=native.format_of(weight, kernel))
    return PackedLinear(weight, bias)


def rotary_table(inv_freq: Tensor, num_positions: int, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` takes, for every position: cos and signed sin, [positions, head_dim] each."""
    angles = torch.outer(torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32), inv_freq.float())
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [..., heads, head_dim]; cos, sin: [..., 1, head_dim] of `rotary_table` (RoFormer 2104.09864, half-split layout)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
