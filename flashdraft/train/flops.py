"""Floating-point operations of what runs inside: one count for every method's training, forward and backward.

Matrix products and attention, by torch's own formulas; elementwise work is left out. torch's FlopCounterMode cannot be used:
it follows modules, which fails inside `torch.autograd.grad`.
"""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCount"]


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
