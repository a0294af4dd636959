"""Floating-point operations of what runs inside: one count for every method's training, forward and backward.

Matrix products and attention, by torch's own formulas; elementwise work is left out. torch's FlopCounterMode cannot be used:
it follows modules, which fails inside `torch.autograd.grad`.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCount"]


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # these two have no formula in torch's table
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        elif func._overloadpacket is _CPU_ATTENTION:
            self.total += _attention(args[0], args[1])
        elif func._overloadpacket is _CPU_ATTENTION_BACKWARD:  # the scores once more, and four products for two
            self.total += 2.5 * _attention(args[1], args[2])
        return out


def _attention(q: torch.Tensor, k: torch.Tensor) -> float:
    """Two products: of queries and keys, of weights and values. q: [b, heads, n, d], k: [b, any heads, m, d]"""
    return 4.0 * q.shape[:3].numel() * k.shape[2] * q.shape[3]
