"""FLOPs of a training step, counted in one way for all methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCount"]


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered: FLOPs of matrix products and attention, both ways.

    By torch's own formulas, forward and backward; elementwise work is left out. torch's
    FlopCounterMode cannot be used: it follows modules, which fails inside `torch.autograd.grad`.
    """

    total = 0.0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        out = func(*args, **options)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **options, out_val=out)
        return out


def _cpu_attention(q: Tensor, k: Tensor, *_: object, **__: object) -> float:
    """Two products: of queries and keys, of weights and values.

    q: [b, heads, n, d], k: [b, any heads, m, d]
    """
    return 4.0 * q.shape[:3].numel() * k.shape[2] * q.shape[3]


def _cpu_attention_backward(_grad: Tensor, q: Tensor, k: Tensor, *_: object, **__: object) -> float:
    """The scores once more, and four products for two."""
    return 2.5 * _cpu_attention(q, k)


_ATEN = torch.ops.aten
_FORMULAS: dict[object, Callable[..., float]] = {
    **flop_registry,  # torch's table, and two that it lacks
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
