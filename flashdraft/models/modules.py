"""The parts of a Qwen3-shaped draft network: modules under Qwen3's names, and rotary frequencies.

Transformers' own classes hold the same weights and compute the same numbers, but the file that they
stand in takes two seconds to import: a third of what a user waits for the first token. Knows sizes
and tensors only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.models.layers import RMSNorm
from flashdraft.process import FLOATS

__all__ = ["MLP", "Attention", "Frequencies", "rotary_frequencies"]


class Attention(nn.Module):
    """The projections and norms of an attention, for a caller that puts them together.

    eps: of the norms; bias: of all four linears.
    """

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, eps: float, bias: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=bias, **FLOATS)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias, **FLOATS)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias, **FLOATS)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=bias, **FLOATS)
        self.q_norm = RMSNorm(head_dim, eps)
        self.k_norm = RMSNorm(head_dim, eps)


class MLP(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), all without biases."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, **FLOATS)
        self.up_proj = nn.Linear(hidden, inner, bias=False, **FLOATS)
        self.down_proj = nn.Linear(inner, hidden, bias=False, **FLOATS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)  # type: ignore[no-any-return]


class Frequencies(NamedTuple):
    """Of rotary positions: what positions are multiplied by, [head_dim / 2], and cos and sin."""

    inv_freq: Tensor
    scaling: float


def rotary_frequencies(qwen3: Mapping[str, Any]) -> Frequencies:
    """The frequencies of a Qwen3 network whose config takes these arguments.

    Transformers is asked only where they are scaled. Raises KeyError, TypeError or ValueError for
    `rope_parameters` that cannot be used.
    """
    rope = qwen3["rope_parameters"]
    theta = rope.get("rope_theta")
    is_plain = rope["rope_type"] == "default" and rope.keys() == {"rope_type", "rope_theta"}
    if is_plain and isinstance(theta, (int, float)):
        head_dim = qwen3["head_dim"]
        exponents = torch.arange(0, head_dim, 2, **FLOATS) / head_dim
        return Frequencies(inv_freq=1.0 / (theta**exponents), scaling=1.0)

    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    made = Qwen3RotaryEmbedding(Qwen3Config(**qwen3))
    return Frequencies(made.inv_freq, float(made.attention_scaling))
