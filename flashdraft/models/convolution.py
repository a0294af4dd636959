"""DFlash 2's grouped dynamic convolutions along a block's rows, around the sublayers of a network.

A sublayer (attention, MLP) with its normed input u has two of them: one makes of u what it reads,
one goes over what it gives. Both kernels are made of u:

    added     = kernel_projection(u)                        of each row: [2, taps, groups]
    before    y[t, c] = sum over taps o of (base[0, o, c] + added[t, 0, o, group of c]) u[t - o, c]
    sublayer  z = sublayer(y)
    behind    w[t, c] = sum over taps o of (base[1, o, c] + added[t, 1, o, group of c]) z[t - o, c]

Tap 0 is the row itself, tap o the row o before it; before a block's first row there are zeros.
Knows rows and their places in blocks. Does not know what a sublayer does, nor a block's context.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.process import FLOATS

__all__ = ["BlockConvolution", "Kernel", "Kernels", "convolved", "kernels_of"]


class Kernel(NamedTuple):
    """One side's, of some rows."""

    base: Tensor  # [taps, hidden]
    added: Tensor  # [n, taps, groups]


Kernels = tuple[Kernel | None, Kernel | None]  # before a sublayer, and behind it; None: nothing


def convolved(x: Tensor, kernel: Kernel | None, places: Tensor) -> Tensor:
    """x [n, hidden], rows of blocks in their order -> [n, hidden].

    places: [n], of each row in its block, from 0. Blocks may differ in length.
    """
    if kernel is None:
        return x

    num_rows, hidden = x.shape
    num_taps, num_groups = kernel.added.shape[1:]
    base = kernel.base.view(num_taps, num_groups, -1)
    added = kernel.added[..., None]
    grouped = x.to(base.dtype).view(num_rows, num_groups, -1)

    out = torch.addcmul(base[0] * grouped, added[:, 0], grouped)
    for tap in range(1, num_taps):
        earlier = F.pad(grouped, (0, 0, 0, 0, tap, 0))[:num_rows]
        is_outside = places < tap
        inside = earlier.masked_fill(is_outside[:, None, None], 0)
        out = torch.addcmul(out, base[tap], inside)
        out = torch.addcmul(out, added[:, tap], inside)
    return out.view(num_rows, hidden)


def kernels_of(base: Tensor, projection: Callable[[Tensor], Tensor], normed: Tensor) -> Kernels:
    """Of both sides. base: [2, taps, hidden]; projection: [n, hidden] -> [n, 2 * taps * groups];
    normed: u [n, hidden]."""
    num_taps = base.shape[1]
    added = projection(normed).to(base.dtype).unflatten(1, (2, num_taps, -1))
    return Kernel(base[0], added[:, 0]), Kernel(base[1], added[:, 1])


class BlockConvolution(nn.Module):
    """A sublayer's two convolutions as they are trained, under their published names.

    New ones change nothing: the fixed part is the row itself, and nothing is added to it.
    """

    def __init__(self, hidden_size: int, taps: int, group_size: int) -> None:
        super().__init__()
        identity = torch.zeros(2, taps, hidden_size, **FLOATS)
        identity[:, 0] = 1
        self.base_kernel = nn.Parameter(identity)
        num_groups = hidden_size // group_size
        width = 2 * taps * num_groups
        self.kernel_projection = nn.Linear(hidden_size, width, bias=False, **FLOATS)
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(self, normed: Tensor) -> Kernels:
        """u [n, hidden] -> the kernels of its rows."""
        return kernels_of(self.base_kernel, self.kernel_projection, normed)
