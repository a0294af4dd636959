"""What draft networks and targets are made of: linears, RMSNorm, rotary positions.

Knows tensors only.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.models import native
from flashdraft.process import FLOATS, new_lock

__all__ = [
    "GROWING",
    "ROPE_TYPES",
    "CosSin",
    "Linear",
    "RMSNorm",
    "Rotary",
    "TorchLinear",
    "apply_rotary",
    "pack",
    "pack_as",
    "rotary_of",
    "rotary_table",
    "scaled_length",
]

# Static kinds: a position's angles do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
GROWING = new_lock()  # a pass of another thread must not find a table shorter than it asked for

_FIRST_POSITIONS = 256  # of a table; it doubles as texts grow


# ---- linears and norms ---------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, over the last dimension, in the weight's dtype: float32 in a new one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps, **FLOATS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class TorchLinear:
    """x -> x @ weight.T + bias where no native linear can be had.

    Not row-exact: torch chooses a kernel by the number of rows.
    """

    row_exact = False
    format = "torch"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        return F.linear(x, self.weight, self.bias)


Linear = TorchLinear | native.NativeLinear


def pack(weight: Tensor, bias: Tensor | None = None, *, kernel: str = "compact") -> Linear:
    """A native linear where one can be had (`kernel`: NativeLinear's), else torch's."""
    if not native.usable(weight):
        return TorchLinear(weight, bias)
    if weight.shape[1] % native.PANEL != 0:
        return TorchLinear(weight, bias)
    return pack_as(kernel, weight, bias)


def pack_as(kernel: str, weight: Tensor, bias: Tensor | None) -> Linear:
    """The linear of a kernel: torch and compiled run torch's own, all others a native one."""
    if kernel in ("torch", "compiled"):
        return TorchLinear(weight, bias)
    return native.NativeLinear(weight, bias, kernel=kernel)


# ---- rotary positions ----------------------------------------------------------------------------

CosSin = tuple[Tensor, Tensor]  # the cosines, and the sines with signs, of some angles


def rotary_of(positions: Tensor, inv_freq: Tensor, scaling: float) -> CosSin:
    """What `apply_rotary` takes at positions [n]: [n, head_dim] each, in float32."""
    angles = torch.outer(positions.float(), inv_freq.float())
    cos = angles.cos() * scaling
    sin = angles.sin() * scaling
    whole_cos = torch.cat((cos, cos), dim=-1)
    signed_sin = torch.cat((-sin, sin), dim=-1)
    return whole_cos, signed_sin


def rotary_table(
    inv_freq: Tensor, num_positions: int, scaling: float, dtype: torch.dtype
) -> CosSin:
    """The same for every position: [positions, head_dim] each."""
    positions = torch.arange(num_positions, dtype=torch.int64, device=inv_freq.device)
    cos, sin = rotary_of(positions, inv_freq, scaling)
    return cos.to(dtype), sin.to(dtype)


class Rotary:
    """Tables of cos and signed sin, as long as positions were asked for so far.

    `like` gives their dtype and device.
    """

    def __init__(self, inv_freq: Tensor, scaling: float, like: Tensor) -> None:
        self.inv_freq = inv_freq.detach().to(like.device, torch.float32)
        self.scaling = scaling
        self.dtype = like.dtype
        self.tables = rotary_table(self.inv_freq, _FIRST_POSITIONS, scaling, self.dtype)
        self._former: list[CosSin] = []  # a pass of another thread may still be reading them

    def reserve(self, num_positions: int) -> bool:
        """Make the tables at least so long; whether they had to grow.

        What they held keeps its bits.
        """
        with GROWING:
            cos, sin = self.tables
            held = len(cos)
            if num_positions <= held:
                return False

            length = max(num_positions, 2 * held)
            fresh = torch.arange(held, length, dtype=torch.int64, device=self.inv_freq.device)
            more_cos, more_sin = rotary_of(fresh, self.inv_freq, self.scaling)
            longer_cos = torch.cat((cos, more_cos.to(self.dtype)))
            longer_sin = torch.cat((sin, more_sin.to(self.dtype)))

            self._former.append(self.tables)
            self.tables = (longer_cos, longer_sin)
            return True

    def at(self, positions: Tensor) -> CosSin:
        """What `apply_rotary` takes for [n, heads, head_dim] at positions [n] that have room."""
        cos, sin = self.tables
        return cos[positions][:, None], sin[positions][:, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoFormer's rotation (2104.09864), half-split layout.

    x: [..., heads, head_dim]; cos, sin: [..., 1, head_dim] of `rotary_table`.
    """
    half = x.shape[-1] // 2
    first = x[..., :half]
    second = x[..., half:]
    swapped = torch.cat((second, first), dim=-1)
    return x * cos + swapped * sin


def scaled_length(limit: int, rope: Mapping[str, Any] | None) -> int:
    """The positions of a config: `limit` is its max_position_embeddings, `rope` its rotary scaling.

    yarn, linear, llama3: the length before scaling times the factor, or `limit` where that is
    scaled already. What was before is `original_max_position_embeddings`, else `limit` itself
    (transformers: "don't update max_position_embeddings").
    longrope, dynamic: one position beyond the first length changes the angles of all, so a text
    ends there.
    """
    if not rope:
        return limit

    kind = rope.get("rope_type", rope.get("type", "default"))
    original = int(rope.get("original_max_position_embeddings") or limit)
    if kind in ("longrope", "su"):
        return min(limit, original)
    if kind in ("linear", "yarn", "llama3"):
        factor = float(rope.get("factor") or 1.0)
        return max(limit, int(original * factor))
    return limit
