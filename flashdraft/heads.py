"""A sequential head: the drafts of a block come to depend on each other. An addition to DFlash v1, in tensors of its own.

The network's marginals are independent per position; the head looks at the token before, left to right, and adds a
zero-initialised SwiGLU of state and previous embedding to the state before the lm_head (as TreeFlash does).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HEADS", "SwigluHead"]

HEADS = ("swiglu",)


class SwigluHead(nn.Module):
    """h_k += W_down (silu(W_gate [h_k ; e]) * W_up [h_k ; e]), e the embedding of x_(k-1)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(2 * hidden_size, 2 * rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """states [n, hidden], embedded [n, hidden] -> [n, hidden]."""
        gate, up = self.gate_up(torch.cat((states, embedded.to(states.dtype)), dim=-1)).chunk(2, dim=-1)
        return states + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]
