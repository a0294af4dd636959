"""One block of a llama-shaped network, ready to be packed: its linears fused, its norms apart.

Knows where a block's weights lie and how to give their memory back. Does not know how it is run.
"""

import ctypes
import mmap
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashdraft.models.attention import Mask
from flashdraft.models.convolution import BlockConvolution
from flashdraft.models.layers import Rotary
from flashdraft.models.native import NativeLinear

__all__ = ["Block", "PackedBlock"]


class Block:
    """One block, fused: q, k, v in one linear, gate and up in another.

    window: a node sees fewer than so many slots back, and as few ahead; causal: it sees none ahead.
    rotary: the block's own, where blocks differ. Windows, and blocks that differ in any of this,
    run on the torch kernel.
    """

    def __init__(
        self,
        block: Any,  # a decoder layer of transformers, or one named like it
        like: Tensor,
        *,
        window: int | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        self.like = like
        self.rotary = rotary
        self.mask = Mask(window, causal)

        attention = block.self_attn
        mlp = block.mlp
        self.parts: dict[str, tuple[nn.Linear, ...]] = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "out": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }

        self.norms: dict[str, Tensor] = {}
        self._add_norm("input_norm", block.input_layernorm.weight)
        self._add_norm("post_norm", block.post_attention_layernorm.weight)
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                self._add_norm(name, getattr(attention, name).weight)

        # Of its convolutions, where it has them: the fixed parts here, what makes the others among
        # the linears.
        self.bases: dict[str, Tensor] = {}
        for name in ("attention_conv", "mlp_conv"):
            self._add_convolution(name, getattr(block, name, None))

    def _add_norm(self, name: str, weight: Tensor) -> None:
        self.norms[name] = weight.detach().to(self.like).contiguous()

    def _add_convolution(self, name: str, convolution: BlockConvolution | None) -> None:
        if convolution is None:
            return
        self.bases[name] = convolution.base_kernel.detach().to(self.like).contiguous()
        self.parts[name] = (convolution.kernel_projection,)

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a fused linear."""
        parts = self.parts[name]
        outputs = sum(len(part.weight) for part in parts)
        return outputs, parts[0].weight.shape[1]

    def fused(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a fused linear.

        Made now: a decoder packs one after the other, and no two are there at once.
        """
        weights = []
        biases = []
        for part in self.parts[name]:
            weights.append(part.weight.detach())
            if part.bias is not None:
                biases.append(part.bias.detach())

        weight = torch.cat(weights).to(self.like)
        bias = torch.cat(biases).to(self.like) if biases else None
        return weight, bias

    def let_go(self, name: str) -> None:
        """Give the memory of a fused linear's sources back; they are empty from now on."""
        for part in self.parts[name]:
            _forget_pages(part.weight)
            part.weight.data = part.weight.data.new_empty(0)


class PackedBlock(NamedTuple):
    """As Block, of a plain llama-shaped model whose linears were packed before."""

    linears: Mapping[str, NativeLinear]  # by the names of Block's parts
    norms: dict[str, Tensor]
    mask: Mask = Mask(None, False)
    rotary: None = None
    bases: Mapping[str, Tensor] = MappingProxyType({})

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a fused linear."""
        linear = self.linears[name]
        return linear.out_features, linear.in_features


def _forget_pages(weight: Tensor) -> None:
    """Tell the system that nobody reads this tensor again.

    Loaded weights are views into a mapped file, whose pages would stay in memory until the last of
    all its tensors goes. Only whole pages within the tensor are named, so that its neighbours lose
    nothing.
    """
    if sys.platform != "linux" or weight.device.type != "cpu":
        return

    page = mmap.PAGESIZE
    start = weight.data_ptr()
    end = start + weight.nbytes
    first = -(-start // page) * page
    last = end // page * page
    if last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
