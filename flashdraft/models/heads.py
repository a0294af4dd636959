"""Sequential heads: what makes a block's drafts depend on each other.

A block-diffusion network's marginals are independent per position. A sequential head goes over a
block from left to right and corrects each position by the tokens that were chosen before it. Every
head is a module under its published tensor names, and a new one changes nothing yet. Knows tensors
and token ids. Does not know blocks' layouts, nor how drafts are chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.models.layers import Linear
from flashdraft.process import FLOATS

__all__ = [
    "HEADS",
    "TRAINED_HEADS",
    "CandidateSelector",
    "ConfidenceHead",
    "GatedMarkovHead",
    "MarkovHead",
    "RecurrentMarkovHead",
    "SwigluHead",
    "domino_projection",
    "swiglu",
]

# swiglu is ours; selector is DFlash 2's; the three of markov are DSpark's: vanilla, gated, rnn.
HEADS = ("swiglu", "selector", "markov", "markov_gated", "markov_rnn", "domino")
TRAINED_HEADS = ("swiglu", "selector", "markov")  # those that `flashdraft train` adds


class SwigluHead(nn.Module):
    """h_k += W_down (silu(W_gate [h_k ; e]) * W_up [h_k ; e]), where e is the embedding of x_(k-1).

    An addition of ours to DFlash v1 (as in TreeFlash), in tensors of its own.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(2 * hidden_size, 2 * rank, bias=False, **FLOATS)
        self.down = nn.Linear(rank, hidden_size, bias=False, **FLOATS)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """states [n, hidden], embedded [n, hidden] -> [n, hidden]."""
        return swiglu(states, embedded, self.gate_up, self.down)


def swiglu(
    states: Tensor, embedded: Tensor, gate_up: Linear | nn.Module, down: Linear | nn.Module
) -> Tensor:
    """What SwigluHead does, by any linears."""
    inputs = torch.cat((states, embedded.to(states.dtype)), dim=-1)
    gate, up = gate_up(inputs).chunk(2, dim=-1)
    return states + down(F.silu(gate) * up)


class CandidateSelector(nn.Module):
    """DFlash 2's pair scores: what is added to the logit of token b behind token a in a row with
    state h is sum_j A[a, j] (P h)[j] B[b, j].

    A and B, the predecessor and the successor codebook, have a row for each of the target's tokens.
    """

    def __init__(self, hidden_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.randn(vocab_size, rank, **FLOATS))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank, **FLOATS))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False, **FLOATS)

    def bias(self, states: Tensor, previous: Tensor, tokens: Tensor) -> Tensor:
        """states [n, hidden] and the tokens before them [n] -> for target ids [m]: [n, m]."""
        projected: Tensor = self.hidden_projection(states)
        rows = self.predecessor_codebook[previous] * projected
        return rows @ self.successor_codebook[tokens].mT


class MarkovHead(nn.Module):
    """DSpark's vanilla head: what is added to the logits behind token a is W2 W1[a].

    W1 has a row for each of the target's tokens, W2 for each of the draft's.
    """

    def __init__(self, rank: int, vocab_size: int, draft_vocab_size: int) -> None:
        super().__init__()
        self.markov_w1 = _Table(vocab_size, rank)
        self.markov_w2 = _Table(draft_vocab_size, rank)
        nn.init.zeros_(self.markov_w2.weight)

    def bias(self, previous: Tensor, drafts: Tensor) -> Tensor:
        """The tokens before [n] -> for draft ids [m]: [n, m]."""
        before: Tensor = self.markov_w1(previous)
        behind: Tensor = self.markov_w2(drafts)
        return before @ behind.mT


class GatedMarkovHead(MarkovHead):
    """DSpark's gated head: W2 (g * W1[a]), where g = sigmoid(G [h ; W1[a]]) and h is the row's
    state."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int, draft_vocab_size: int) -> None:
        super().__init__(rank, vocab_size, draft_vocab_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank, **FLOATS)


class RecurrentMarkovHead(MarkovHead):
    """DSpark's rnn head: W2 tanh(o), where z = [s ; W1[a] ; h] and (g, c, o) are the thirds of
    J z, and s becomes sigmoid(g) s + (1 - sigmoid(g)) tanh(c); it begins at zero."""

    def __init__(self, hidden_size: int, rank: int, vocab_size: int, draft_vocab_size: int) -> None:
        super().__init__(rank, vocab_size, draft_vocab_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank, **FLOATS)


class ConfidenceHead(nn.Module):
    """DSpark's: the chance that a row's draft is accepted if all before it were is
    sigmoid(w [h ; W1[a]] + b), or without W1[a] (`rank` 0)."""

    def __init__(self, hidden_size: int, rank: int = 0) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + rank, 1, **FLOATS)


def domino_projection(
    hidden_size: int, num_states: int, rank: int, vocab_size: int
) -> nn.Sequential:
    """Domino's correction E2 silu(E0 [h ; g]) of the logits, g its GRU's state; a new one is 0."""
    inner = nn.Linear(hidden_size + num_states, rank, bias=False, **FLOATS)
    outer = nn.Linear(rank, vocab_size, bias=False, **FLOATS)
    nn.init.zeros_(outer.weight)
    return nn.Sequential(inner, nn.SiLU(), outer)


class _Table(nn.Module):
    """A row a token."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_rows, width, **FLOATS))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)
