"""What draft networks and targets are made of: linears, RMSNorm, rotary positions, sequential heads. Knows tensors only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft import native
from flashdraft.process import FLOATS

__all__ = ["HEADS", "ROPE_TYPES", "Linear", "RMSNorm", "SwigluHead", "TorchLinear", "apply_rotary", "pack", "rotary_table"]
__all__ += ["swiglu"]

HEADS = ("swiglu",)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # static: a position's angles do not depend on the length


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension, in the weight's dtype: float32 in a new one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps, **FLOATS)

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


class SwigluHead(nn.Module):
    """A sequential head, left to right: h_k += W_down (silu(W_gate [h_k ; e]) * W_up [h_k ; e]), e the embedding of x_(k-1).

    The network's marginals are independent per position; so the drafts of a block come to depend on each other (as in TreeFlash).
    An addition to DFlash v1, in tensors of its own; a new one changes nothing.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(2 * hidden_size, 2 * rank, bias=False, **FLOATS)
        self.down = nn.Linear(rank, hidden_size, bias=False, **FLOATS)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """states [n, hidden], embedded [n, hidden] -> [n, hidden]."""
        return swiglu(states, embedded, self.gate_up, self.down)


def swiglu(states: Tensor, embedded: Tensor, gate_up: Linear | nn.Module, down: Linear | nn.Module) -> Tensor:
    """What SwigluHead does, by any linears."""
    gate, up = gate_up(torch.cat((states, embedded.to(states.dtype)), dim=-1)).chunk(2, dim=-1)
    return states + down(F.silu(gate) * up)
