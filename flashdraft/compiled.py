"""Static shapes around a decoder: one compiled function from tokens to logits and features, which a CUDA graph can replay.

Nodes are padded to a few widths, rows are all rows of the cache, all slots are read under a mask made of length tensors; so one
trace serves every length and proposal of a width. A cache that grows is traced again. Knows no drafter, verification or text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashdraft.cache import SlotCache
from flashdraft.decoder import Decoder, Output, Pair

__all__ = ["CompiledStep", "padded"]

_LIMITS: Any = {"recompile_limit": 64, "isolate_recompiles": True}  # widths times sizes of the cache; beyond 64 torch raises


def padded(num_nodes: int) -> int:
    """1, 2, 4, 8, 16, or a multiple of 32."""
    return next((width for width in (1, 2, 4, 8, 16) if num_nodes <= width), -(-num_nodes // 32) * 32)


def _pin(tensors: list[Any]) -> None:
    """A graph reads these where they lie, instead of copying them in; if one lies elsewhere, the graph is recorded again."""
    for tensor in filter(torch.is_tensor, tensors):
        torch._dynamo.mark_static_address(tensor)


class CompiledStep:
    """embed: tokens [n] -> [n, hidden]; head: what follows the final state, [n, hidden] -> [n, out]; weights: of both."""

    def __init__(self, decoder: Decoder, embed: Any, head: Any, weights: list[Any]) -> None:
        self.decoder, self.embed, self.head, self.device = decoder, embed, head, decoder.norm.device
        linears = [linear for linears in decoder.linears for linear in linears.values()]
        weights += [decoder.norm, decoder.cos, decoder.sin, *(norm for norms in decoder.norms for norm in norms.values())]
        _pin(weights + [tensor for linear in linears for tensor in (linear.weight, linear.bias)])
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
        self._step: Any = torch.compile(self._trace, fullgraph=True, dynamic=False, mode=mode, **_LIMITS)

    def __call__(
        self, cache: SlotCache, slots: Sequence[int], tokens: Tensor, shape: tuple[Tensor, Tensor, Tensor], layers: Sequence[int]
    ) -> Output:
        """As Decoder.__call__, but of tokens [rows, nodes], and with the head behind the final state."""
        seen, depths, sizes = shape
        lengths, at, n = torch.tensor([cache.lengths[slot] for slot in slots]), torch.tensor(slots), tokens.shape[1]
        cache.reserve(int((lengths + sizes).max()) + 1)  # the last slot takes what padding writes
        if cache.addresses is None:
            cache.addresses = self.decoder.slots_of(cache)
            _pin([tensor for pair in cache.addresses for tensor in pair])
        whole = []
        for own in (tokens, lengths, sizes, depths, seen):
            whole.append(own.new_zeros(cache.rows, *[padded(n)] * (own.ndim - 1)))
            inner: Any = [slice(n)] * (own.ndim - 1)
            whole[-1][(at, *inner)] = own
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay gave is no longer needed
        out, features = self._step([t.to(self.device) for t in whole], cache.addresses, tuple(layers))
        at = at.to(self.device)  # indexing copies, and it has to: the next replay overwrites what a graph gave
        return out[at, :n], None if features is None else features[at, :n]

    def _trace(self, shape: list[Tensor], kv: Sequence[Pair], layers: Sequence[int]) -> Output:
        """All rows and nodes, padding included; a row that is not in this pass has size 0."""
        (tokens, lengths, sizes, depths, seen), (rows, width) = shape, shape[0].shape
        node, row = (torch.arange(n, device=tokens.device) for n in (width, rows))
        real = node < sizes[:, None]
        place = torch.where(real, lengths[:, None] + node, kv[0][0].shape[2] - 1).flatten()
        positions = torch.where(real, lengths[:, None] + depths, 0).flatten()
        attend = self.decoder.attend_to(kv, lengths, seen, (row[:, None].expand(rows, width).flatten(), None, place))
        states, features = self.decoder.run(self.embed(tokens.flatten()), positions, attend, layers)
        out = self.head(states).view(rows, width, -1).masked_fill(~real[..., None], 0)
        return out, None if features is None else features.view(rows, width, -1).masked_fill(~real[..., None], 0)
