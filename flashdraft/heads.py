"""Sequential heads: how the drafts of a block come to depend on each other. An addition to DFlash v1, in tensors of its own.

The network's marginals are independent per position; a head looks at the token before, left to right, and corrects them.
`markov` adds W2 W1[x_(k-1)] to the logits (DSpark 2607.05147); `swiglu` adds a zero-initialised SwiGLU of state and
previous embedding to the state before the lm_head (as TreeFlash does). Knows tensors; does not know blocks or decoding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HEADS", "MarkovHead", "SequentialHead", "SwigluHead"]


class MarkovHead(nn.Module):
    """logits_k += W2 W1[x_(k-1)], over the draft vocabulary."""

    def __init__(self, vocab_size: int, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.previous = nn.Embedding(vocab_size, rank)
        self.output = nn.Linear(rank, num_outputs, bias=False)
        nn.init.zeros_(self.output.weight)

    def correct(self, states: Tensor, _embedded: Tensor) -> Tensor:
        return states

    def bias(self, tokens: Tensor) -> Tensor | None:
        """tokens: [n], one position before -> [n, draft vocabulary], to be added to the logits."""
        return self.output(self.previous(tokens))  # type: ignore[no-any-return]


class SwigluHead(nn.Module):
    """h_k += W_down (silu(W_gate [h_k ; e]) * W_up [h_k ; e]), e the embedding of x_(k-1)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(2 * hidden_size, 2 * rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def correct(self, states: Tensor, embedded: Tensor) -> Tensor:
        """states [n, hidden], embedded [n, hidden] -> [n, hidden]."""
        gate, up = self.gate_up(torch.cat((states, embedded.to(states.dtype)), dim=-1)).chunk(2, dim=-1)
        return states + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def bias(self, _tokens: Tensor) -> Tensor | None:
        return None


SequentialHead = MarkovHead | SwigluHead
HEADS = ("markov", "swiglu")
