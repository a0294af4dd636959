"""The blocks of a llama-shaped network, for targets and draft networks alike: one pass over tokens of many sequences.

Two ways to run them, equal to 1e-4: a whole pass in one call of the C++ kernels (native.py), which is row-exact, so that the
text of a draft and plain text agree bit for bit; or torch operations on packed linears, which are not, and which CompiledStep
traces. Does not know drafters or what a token means.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.models import native
from flashdraft.models.cache import SlotCache, round_up
from flashdraft.models.layers import GROWING, Linear, Rotary, TorchLinear, apply_rotary
from flashdraft.process import INTS, new_lock

__all__ = ["Block", "CompiledStep", "Decoder", "padded"]

Pair = tuple[Tensor, Tensor]
Mask = tuple[int | None, bool]  # of a block: its window, and whether it is causal
Output = tuple[
    Tensor, Tensor | None
]  # states, and the wanted layers' outputs side by side if there are any
Attend = Callable[
    [int, Tensor, Tensor, Tensor], Tensor
]  # layer; q, k, v [tokens, heads, head_dim] -> [tokens, heads * head_dim]
_LIMITS: Any = {
    "recompile_limit": 64,
    "isolate_recompiles": True,
}  # widths times sizes of the cache; beyond 64 torch raises


class Block:
    """One block, fused: q, k, v in one linear, gate and up in another.

    window: a node sees fewer than so many slots back, and as few ahead; causal: it sees none ahead. rotary: the block's own,
    where blocks differ. Windows, and blocks that differ in any of this, run on the torch kernel.
    """

    def __init__(
        self,
        block: Any,
        like: Tensor,
        *,
        window: int | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        self.like, self.rotary = like, rotary
        self.mask: Mask = (window, causal)
        attention, mlp = block.self_attn, block.mlp
        self.parts: dict[str, tuple[Any, ...]] = {
            "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "out": (attention.o_proj,),
            "gate_up": (mlp.gate_proj, mlp.up_proj),
            "down": (mlp.down_proj,),
        }
        norms = {"input_norm": block.input_layernorm, "post_norm": block.post_attention_layernorm}
        norms |= {
            name: getattr(attention, name)
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        }
        self.norms = {
            name: norm.weight.detach().to(like).contiguous() for name, norm in norms.items()
        }

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a fused linear."""
        parts = self.parts[name]
        return sum(len(part.weight) for part in parts), parts[0].weight.shape[1]

    def fused(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a fused linear, made now: a decoder packs one after the other, and no two are there at once."""
        parts = self.parts[name]
        weight = torch.cat([part.weight.detach() for part in parts]).to(self.like)
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        return weight, torch.cat(biases).to(self.like) if biases else None

    def let_go(self, name: str) -> None:
        """Give the memory of a fused linear's sources back; they are empty from now on."""
        for part in self.parts[name]:
            _forget_pages(part.weight)
            part.weight.data = part.weight.data.new_empty(0)


def _forget_pages(weight: Tensor) -> None:
    """Tell the system that nobody reads this tensor again.

    Loaded weights are views into a mapped file, whose pages would stay in memory until the last of all its tensors goes. Only
    whole pages within the tensor are named, so that its neighbours lose nothing.
    """
    if sys.platform != "linux" or weight.device.type != "cpu":
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
        )


class Decoder:
    """Blocks and the norm behind them, packed. rotary: of the blocks that have none of their own."""

    def __init__(
        self,
        blocks: Iterable[Block],
        norm: Tensor,
        *,
        rotary: Rotary,
        eps: float,
        kernel: str = "compact",
        consume: bool = False,
    ) -> None:
        self.norm, self.eps, self.hidden_size = norm.contiguous(), eps, len(norm)
        kept = list(blocks)
        self.norms, self.masks = [block.norms for block in kept], [block.mask for block in kept]
        own = [block.rotary or rotary for block in kept]
        self.rotaries = list(
            dict.fromkeys(own)
        )  # those that are there, and which of them each block has
        self.which = [self.rotaries.index(one) for one in own]
        qkv, out, down = (kept[0].shape(name) for name in ("qkv", "out", "down"))
        self.inner, self.head_dim = down[1], 2 * len(rotary.inv_freq)
        self.heads, self.kv_heads = out[1] // self.head_dim, (qkv[0] - out[1]) // self.head_dim // 2
        alike = len({*self.masks}) == 1 and len(self.rotaries) == 1
        whole = (
            alike and self.masks[0][0] is None
        )  # one mask and one table for all blocks is what the kernels take
        fits = native.usable(norm) and whole and self.odd_size() is None
        self.native = fits and kernel not in ("torch", "compiled")
        self.kernel = kernel if self.native or kernel == "compiled" else "torch"
        self.linears = [self._packed_block(block, consume=consume) for block in kept]
        everything = [linear for linears in self.linears for linear in linears.values()]
        self.row_exact, self.nbytes = (
            all(one.row_exact for one in everything),
            sum(one.nbytes for one in everything),
        )
        self.formats = sorted({linear.format for linear in everything})
        self._model = self._native_model() if self.native else None
        self.attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.seconds: Tensor | None = (
            None  # set it to a float64 [3]: linears, attention and the rest add up there
        )

    def odd_size(self) -> str | None:
        """The first size that the C++ kernels cannot take, in words, or None."""
        steps = {
            "hidden size": (self.hidden_size, 32),
            "head size (head_dim)": (self.head_dim, 16),
            "heads times head size": (self.heads * self.head_dim, 32),
            "intermediate size": (self.inner, 32),
        }
        for name, (size, step) in steps.items():
            if size % step:
                return f"its {name} is {size}, which is no multiple of {step}"
        if self.head_dim > 256:
            return f"its head size (head_dim) is {self.head_dim}, which is above 256"
        return None

    def __call__(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        x: Tensor,
        shape: tuple[Tensor, Tensor, Tensor],
        layers: Sequence[int],
    ) -> Output:
        """Read nodes behind the rows' lengths, which stay. x: [rows, nodes, hidden].

        shape: who sees whom, bool [rows, nodes, nodes]; positions behind the length [rows, nodes]; sizes [rows], the rest is
        padding and comes back as zeros.
        Returns the final normed state [rows, nodes, hidden] and the wanted layers' outputs side by side.
        """
        if self._model is not None:
            native.call_team()
        seen, depths, sizes = shape
        lengths = [cache.lengths[slot] for slot in slots]
        starts = torch.tensor(lengths, **INTS)
        counts = sizes.tolist()
        needed = max(map(sum, zip(lengths, counts, strict=True)))
        native.ensure(needed <= cache.slots, "the cache has too few slots")
        native.ensure(0 <= min(slots) <= max(slots) < cache.rows, "no such row in the cache")
        native.ensure(
            1 <= min(counts) <= max(counts) <= x.shape[1],
            "a row with more nodes than there are, or none",
        )
        self.reserve(needed)
        real = torch.arange(x.shape[1], **INTS) < sizes[:, None]  # nothing below sees padding
        packed = x.flatten(0, 1) if min(counts) == x.shape[1] else x[real]
        if self._model is not None:
            seen = seen.tril() if self.masks[0][1] else seen
            states, features = self._native(
                cache, packed, (torch.tensor(slots, **INTS), starts, sizes, depths, seen), layers
            )
        else:
            states, features = self.run(
                packed, *self._torch(cache, slots, (starts, depths, seen, real)), layers
            )
        return _spread(states, real), None if features is None else _spread(features, real)

    def reserve(self, num_positions: int) -> bool:
        """Room for so many positions in the rotary tables; whether they had to grow."""
        with GROWING:
            grown = [rotary.reserve(num_positions) for rotary in self.rotaries]
            if self._model is not None:
                self._model.cos, self._model.sin = self._table_pointers()
            return any(grown)

    def _torch(
        self, cache: SlotCache, slots: Sequence[int], shape: tuple[Tensor, ...]
    ) -> tuple[Tensor, Attend]:
        """Positions [tokens] without padding, and attention to what the rows from the first slot to the last one hold."""
        starts, depths, seen, real = shape
        first, rows, width = min(slots), max(slots) - min(slots) + 1, real.shape[1]
        reads = min(round_up(int(starts.max()) + width), cache.slots)
        kv = [
            (k[first : first + rows, :, :reads], v[first : first + rows, :, :reads])
            for k, v in self.slots_of(cache)
        ]
        row, (which, node) = torch.tensor(slots, **INTS) - first, real.nonzero(as_tuple=True)
        lengths, own = starts.new_zeros(rows), seen.new_zeros(rows, width, width)
        lengths[row], own[row] = starts, seen
        given = (
            starts[which] + depths[which, node],
            lengths,
            own,
            row[which],
            node,
            starts[which] + node,
        )
        positions, lengths, own, *at = (t.to(self.norm.device) for t in given)
        return positions, self.attend_to(kv, lengths, own, at)

    def run(self, x: Tensor, positions: Tensor, attend: Attend, layers: Sequence[int]) -> Output:
        """x [tokens, hidden], positions [tokens] -> the final normed states and the wanted layers' outputs side by side."""
        rotated = [rotary.at(positions) for rotary in self.rotaries]
        wanted: dict[int, Tensor] = {}
        split = self.heads, self.kv_heads
        for index, (norms, linears) in enumerate(zip(self.norms, self.linears, strict=True)):
            qkv = linears["qkv"](self._normed(x, norms["input_norm"])).view(
                len(x), -1, self.head_dim
            )
            qk, v = qkv.split((sum(split), self.kv_heads), dim=1)
            if "q_norm" in norms:
                q, k = qk.split(split, dim=1)
                qk = torch.cat(
                    (self._normed(q, norms["q_norm"]), self._normed(k, norms["k_norm"])), dim=1
                )
            q, k = apply_rotary(qk, *rotated[self.which[index]]).split(split, dim=1)
            x = x + linears["out"](attend(index, q, k, v))
            gate, up = linears["gate_up"](self._normed(x, norms["post_norm"])).chunk(2, dim=-1)
            x = x + linears["down"](F.silu(gate) * up)
            if index in layers:
                wanted[index] = x
        x = self._normed(x, self.norm)
        wanted[len(self.norms)] = x
        return x, torch.cat([wanted[i] for i in layers], dim=-1) if layers else None

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def attend_to(
        self, kv: Sequence[Pair], starts: Tensor, seen: Tensor, at: Sequence[Tensor | None]
    ) -> Attend:
        """One call for all rows and nodes, under each block's own mask.

        kv: every layer's keys and values [rows, kv_heads, slots, head_dim]; starts: what the rows hold [rows]; seen [rows,
        nodes, nodes]; at: of each token its row, node and slot; node is None where all nodes of all rows come in order.
        """
        (row, node, place), (rows, width) = at, seen.shape[:2]
        slots = torch.arange(kv[0][0].shape[2], dtype=torch.int64, device=starts.device)
        groups, behind = self.heads // self.kv_heads, (slots - starts[:, None])[:, None]
        node_places = torch.arange(width, dtype=torch.int64, device=starts.device)
        ahead = behind - node_places[:, None]  # slots from a node to what it may see
        masks = {}
        for window, causal in dict.fromkeys(self.masks):
            own = (seen.tril() if causal else seen).gather(
                2, behind.clamp(0, width - 1).expand(rows, width, -1)
            )
            visible = (behind < 0) | ((behind < width) & own)
            if window is not None:
                visible = visible & (ahead > -window) & (ahead < window)
            visible = visible | (
                ~visible.any(-1, keepdim=True) & (slots == 0)
            )  # whoever is padding reads something
            mask = torch.zeros_like(visible, dtype=self.norm.dtype).masked_fill(
                ~visible, -torch.inf
            )
            masks[window, causal] = mask.repeat(1, groups, 1)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = kv[layer]
            keys[row, :, place], values[row, :, place] = k, v
            query = (
                q
                if node is None
                else q.new_zeros(rows, width, *q.shape[1:]).index_put((row, node), q)
            )
            query = query.view(rows, width, self.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
            folded = query.reshape(rows, self.kv_heads, groups * width, -1)
            out = self.attention(folded, keys, values, attn_mask=masks[self.masks[layer]])
            out = out.view(rows, self.heads, width, -1).transpose(1, 2)
            return (out.flatten(0, 1) if node is None else out[row, node]).flatten(1)

        return attend

    def slots_of(self, cache: SlotCache) -> list[tuple[Tensor, Tensor]]:
        """Every layer's keys and values."""
        like = self.norm.new_empty(self.kv_heads, 0, self.head_dim)
        return [cache.layer(index, like) for index in range(len(self.norms))]

    def _packed_block(self, block: Block, *, consume: bool) -> dict[str, Linear]:
        linears = {}
        for name in block.parts:
            linears[name] = self._packed(name, *block.fused(name))
            if consume:
                block.let_go(name)
        return linears

    def _packed(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        if not self.native:
            return TorchLinear(weight, bias)
        if name == "gate_up":  # the kernel multiplies a panel of one with a panel of the other
            weight, bias = _interleaved(weight), None if bias is None else _interleaved(bias)
        return native.NativeLinear(weight, bias, kernel=self.kernel)

    def _native_model(self) -> native.Model:
        mixed = self.heads * self.head_dim
        shapes = {
            "qkv": (mixed + 2 * self.kv_heads * self.head_dim, self.hidden_size),
            "out": (self.hidden_size, mixed),
        }
        shapes |= {
            "gate_up": (2 * self.inner, self.hidden_size),
            "down": (self.hidden_size, self.inner),
        }
        self._layers = (native.Layer * len(self.linears))()
        for struct, norms, linears in zip(self._layers, self.norms, self.linears, strict=True):
            for name, norm in norms.items():
                size = self.head_dim if name in ("q_norm", "k_norm") else self.hidden_size
                setattr(struct, name, native.pointer(norm, name, size))
            for name, linear in linears.items():
                assert isinstance(linear, native.NativeLinear)
                native.ensure(
                    (linear.out_features, linear.in_features) == shapes[name],
                    f"{name} is of another size",
                )
                setattr(struct, name, linear.struct)
        sizes = (
            len(self.linears),
            self.hidden_size,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.inner,
            self.eps,
        )
        norm = native.pointer(self.norm, "the last norm", self.hidden_size)
        return native.Model(*sizes, self._layers, norm, *self._table_pointers())

    def _table_pointers(self) -> list[int]:
        """Where cos and sin lie."""
        tables = self.rotaries[0].tables
        return [
            native.pointer(table, "a rotary table", len(tables[0]) * self.head_dim)
            for table in tables
        ]

    def _native(
        self, cache: SlotCache, x: Tensor, shape: Sequence[Tensor], layers: Sequence[int]
    ) -> Output:
        assert self._model is not None
        _, starts, counts, depths, _ = shape
        room = len(self.rotaries[0].tables[0])
        if int(starts.max()) + int(depths.max()) >= room:  # padding may lie beyond, a node may not
            real = torch.arange(depths.shape[1], **INTS) < counts[:, None]
            last = ((starts[:, None] + depths) * real).max()
            native.ensure(int(last) < room, f"position {int(last)} of {room}")
        wanted = [-1] * (len(self.linears) + 1)
        for i, layer in enumerate(layers):
            wanted[layer] = i * self.hidden_size
        if cache.addresses is None:
            count = cache.rows * self.kv_heads * cache.slots * self.head_dim
            cache.addresses = native.addresses(self.slots_of(cache), count)
        sizes = (
            (self.heads + 2 * self.kv_heads) * self.head_dim,
            self.heads * self.head_dim,
            self.inner,
        )
        *work, features = (
            x.new_empty(len(x), size) for size in (*sizes, len(layers) * self.hidden_size)
        )
        tensors = torch.tensor(wanted, **INTS), x, *work, features
        native.step(self._model, cache.slots, shape, cache.addresses, tensors, self.seconds)
        return x, features if layers else None


def _interleaved(pair: Tensor) -> Tensor:
    panels: Tensor = pair.unflatten(0, (2, -1, native.PANEL))
    return panels.transpose(0, 1).flatten(0, 2)


def _spread(packed: Tensor, real: Tensor) -> Tensor:
    """[tokens, size] back to [rows, nodes, size]; padding is zero."""
    if len(packed) == real.numel():
        return packed.view(*real.shape, -1)
    out = packed.new_zeros(*real.shape, packed.shape[-1])
    out[real] = packed
    return out


def padded(num_nodes: int) -> int:
    """1, 2, 4, 8, 16, or a multiple of 32."""
    return next(
        (width for width in (1, 2, 4, 8, 16) if num_nodes <= width), -(-num_nodes // 32) * 32
    )


def _pin(tensors: list[Any]) -> None:
    """A graph reads these where they lie, instead of copying them in; if one lies elsewhere, the graph is recorded again."""
    for tensor in filter(torch.is_tensor, tensors):
        torch._dynamo.mark_static_address(tensor)


class CompiledStep:
    """Static shapes around a decoder: one compiled function from tokens to logits and features, which a CUDA graph can replay.

    Nodes are padded to a few widths, rows are all rows of the cache, all slots are read under a mask made of length tensors; so
    one trace serves every length and proposal of a width. A cache that grows is traced again.
    embed: tokens [n] -> [n, hidden]; head: what follows the final state, [n, hidden] -> [n, out]; weights: of both;
    num_positions: of the longest text.
    """

    def __init__(
        self, decoder: Decoder, embed: Any, head: Any, weights: list[Any], *, num_positions: int
    ) -> None:
        decoder.reserve(num_positions)  # all at once: a table that grows is traced again
        self.decoder, self.embed, self.head, self.device = decoder, embed, head, decoder.norm.device
        self._lock = new_lock()  # a replayed graph writes where the last one did
        linears = [linear for linears in decoder.linears for linear in linears.values()]
        weights += [
            decoder.norm,
            *self._tables(),
            *(norm for norms in decoder.norms for norm in norms.values()),
        ]
        _pin(weights + [tensor for linear in linears for tensor in (linear.weight, linear.bias)])
        mode = "reduce-overhead" if self.device.type == "cuda" else None  # CUDA graphs
        self._step: Any = torch.compile(
            self._trace, fullgraph=True, dynamic=False, mode=mode, **_LIMITS
        )

    def __call__(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        tokens: Tensor,
        shape: tuple[Tensor, Tensor, Tensor],
        layers: Sequence[int],
    ) -> Output:
        """As Decoder.__call__, but of tokens [rows, nodes], and with the head behind the final state."""
        seen, depths, sizes = shape
        lengths = torch.tensor([cache.lengths[slot] for slot in slots], **INTS)
        at, n = torch.tensor(slots, **INTS), tokens.shape[1]
        needed = int((lengths + sizes).max())
        cache.reserve(needed + 1)  # the last slot takes what padding writes
        if self.decoder.reserve(needed):
            _pin(self._tables())
        if cache.addresses is None:
            cache.addresses = self.decoder.slots_of(cache)
            _pin([tensor for pair in cache.addresses for tensor in pair])
        whole = []
        for own in (tokens, lengths, sizes, depths, seen):
            whole.append(own.new_zeros(cache.rows, *[padded(n)] * (own.ndim - 1)))
            inner: Any = [slice(n)] * (own.ndim - 1)
            whole[-1][(at, *inner)] = own
        at, inputs = at.to(self.device), [t.to(self.device) for t in whole]
        with self._lock:
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()  # what the last replay gave is no longer needed
            out, features = self._step(inputs, cache.addresses, tuple(layers))
            # indexing copies, and it has to: the next replay overwrites what a graph gave
            return out[at, :n], None if features is None else features[at, :n]

    def _tables(self) -> list[Tensor]:
        return [table for rotary in self.decoder.rotaries for table in rotary.tables]

    def _trace(self, shape: list[Tensor], kv: Sequence[Pair], layers: Sequence[int]) -> Output:
        """All rows and nodes, padding included; a row that is not in this pass has size 0."""
        (tokens, lengths, sizes, depths, seen), (rows, width) = shape, shape[0].shape
        node, row = (
            torch.arange(n, dtype=torch.int64, device=tokens.device) for n in (width, rows)
        )
        real = node < sizes[:, None]
        place = torch.where(real, lengths[:, None] + node, kv[0][0].shape[2] - 1).flatten()
        positions = torch.where(real, lengths[:, None] + depths, 0).flatten()
        attend = self.decoder.attend_to(
            kv, lengths, seen, (row[:, None].expand(rows, width).flatten(), None, place)
        )
        states, features = self.decoder.run(self.embed(tokens.flatten()), positions, attend, layers)
        out = self.head(states).view(rows, width, -1).masked_fill(~real[..., None], 0)
        return out, None if features is None else features.view(rows, width, -1).masked_fill(
            ~real[..., None], 0
        )
