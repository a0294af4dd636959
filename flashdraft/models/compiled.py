"""Static shapes around a decoder: torch.compile traces it seldom, and a CUDA graph can replay it.

Knows widths, paddings and where tensors lie. The pass itself is Decoder.run, as without it.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flashdraft.models.attention import Places
from flashdraft.models.cache import SlotCache
from flashdraft.models.decoder import Decoder, KeysValues, Layout, Output
from flashdraft.process import INTS, new_lock

__all__ = ["CompiledStep", "padded"]

Traced = Callable[[list[Tensor], Sequence[KeysValues], tuple[int, ...]], Output]

_SMALL_WIDTHS = (1, 2, 4, 8, 16)
_WIDTH_STEP = 32
_RECOMPILE_LIMIT = 64  # widths times sizes of the cache; beyond it torch raises


def padded(num_nodes: int) -> int:
    """1, 2, 4, 8, 16, or a multiple of 32."""
    for width in _SMALL_WIDTHS:
        if num_nodes <= width:
            return width
    return -(-num_nodes // _WIDTH_STEP) * _WIDTH_STEP


class CompiledStep:
    """One compiled function from tokens to logits and features, which a CUDA graph can replay.

    Nodes are padded to a few widths, rows are all rows of the cache, all slots are read under a
    mask made of length tensors; so one trace serves every length and proposal of a width. A cache
    that grows is traced again.

    embed: tokens [n] -> [n, hidden]; head: what follows the final state, [n, hidden] -> [n, out];
    weights: of both; num_positions: of the longest text.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        weights: Iterable[Tensor | None],
        *,
        num_positions: int,
    ) -> None:
        decoder.reserve(num_positions)  # all at once: a table that grows is traced again
        self.decoder = decoder
        self.embed = embed
        self.head = head
        self.device = decoder.norm.device
        self._lock = new_lock()  # a replayed graph writes where the last one did

        _pin(weights)
        _pin(self._tables())
        _pin([decoder.norm])
        for norms, bases in zip(decoder.norms, decoder.bases, strict=True):
            _pin(norms.values())
            _pin(bases.values())
        for linear in decoder.all_linears():
            _pin([linear.weight, linear.bias])

        self._step: Traced = torch.compile(  # type: ignore[call-overload] # it lacks the limits
            self._trace,
            fullgraph=True,
            dynamic=False,
            mode="reduce-overhead" if self.device.type == "cuda" else None,  # CUDA graphs
            recompile_limit=_RECOMPILE_LIMIT,
            isolate_recompiles=True,
        )

    def __call__(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        tokens: Tensor,
        layout: Layout,
        layers: Sequence[int],
    ) -> Output:
        """As Decoder.__call__, but of tokens [rows, nodes], and with the head behind the states."""
        lengths = torch.tensor([cache.lengths[slot] for slot in slots], **INTS)
        needed = int((lengths + layout.sizes).max())
        cache.reserve(needed + 1)  # the last slot takes what padding writes
        if self.decoder.reserve(needed):
            _pin(self._tables())
        if cache.addresses is None:
            cache.addresses = self.decoder.slots_of(cache)
            for keys_values in cache.addresses:
                _pin(keys_values)

        rows = torch.tensor(slots, **INTS)
        num_nodes = tokens.shape[1]
        width = padded(num_nodes)
        inputs = []
        own_inputs = (tokens, lengths, layout.sizes, layout.depths, layout.seen)
        for own in own_inputs:
            whole = _widened(own, rows, cache.rows, width)
            inputs.append(whole.to(self.device))
        rows = rows.to(self.device)

        with self._lock:
            if self.device.type == "cuda":
                # What the last replay gave is no longer needed.
                torch.compiler.cudagraph_mark_step_begin()
            out, features = self._step(inputs, cache.addresses, tuple(layers))
            # Indexing copies, and it has to: the next replay overwrites what a graph gave.
            out = out[rows, :num_nodes]
            if features is not None:
                features = features[rows, :num_nodes]
            return out, features

    def _tables(self) -> list[Tensor]:
        tables: list[Tensor] = []
        for rotary in self.decoder.rotaries:
            tables.extend(rotary.tables)
        return tables

    def _trace(
        self, inputs: list[Tensor], kv: Sequence[KeysValues], layers: Sequence[int]
    ) -> Output:
        """All rows and nodes, padding included; a row that is not in this pass has size 0.

        inputs: tokens, lengths, sizes, depths, and who sees whom.
        """
        tokens, lengths, sizes, depths, seen = inputs
        rows, width = tokens.shape
        last_slot = kv[0][0].shape[2] - 1
        node = torch.arange(width, dtype=torch.int64, device=tokens.device)
        row = torch.arange(rows, dtype=torch.int64, device=tokens.device)

        real = node < sizes[:, None]
        slot = torch.where(real, lengths[:, None] + node, last_slot)
        positions = torch.where(real, lengths[:, None] + depths, 0).flatten()
        row_of_token = row[:, None].expand(rows, width).flatten()
        node_of_token = node.expand(rows, width).flatten()
        at = Places(row_of_token, node=None, slot=slot.flatten())
        attend = self.decoder.attend_to(kv, lengths, seen, at)
        embedded = self.embed(tokens.flatten())
        at_tokens = (positions, node_of_token)
        states, features = self.decoder.run(embedded, at_tokens, attend, layers)

        out = _by_row(self.head(states), real)
        if features is not None:
            features = _by_row(features, real)
        return out, features


def _pin(tensors: Iterable[Tensor | None]) -> None:
    """A graph reads these where they lie, instead of copying them in.

    If one lies elsewhere later, the graph is recorded again.
    """
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor)


def _by_row(packed: Tensor, real: Tensor) -> Tensor:
    """[rows * nodes, size] -> [rows, nodes, size]; padding is zero."""
    by_row = packed.view(*real.shape, -1)
    return by_row.masked_fill(~real[..., None], 0)


def _widened(own: Tensor, rows: Tensor, num_rows: int, width: int) -> Tensor:
    """The rows of a pass at their places among all rows, their nodes padded to `width` by zeros.

    own: [len(rows)], [len(rows), nodes] or [len(rows), nodes, nodes].
    """
    padded_dims = [width] * (own.ndim - 1)
    whole = own.new_zeros(num_rows, *padded_dims)
    if own.ndim == 1:
        whole[rows] = own
    elif own.ndim == 2:
        whole[rows, : own.shape[1]] = own
    else:
        whole[rows, : own.shape[1], : own.shape[2]] = own
    return whole
