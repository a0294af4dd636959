"""The blocks of a llama-shaped network, for targets and draft networks alike.

A decoder makes one pass over the tokens of many sequences, in one of two ways, equal to 1e-4: the
whole pass in one call of the C++ kernels (native.py), which is row-exact, so that the text of a
draft and plain text agree bit for bit; or torch operations on packed linears, which are not, and
which CompiledStep (compiled.py) traces.

Does not know drafters or what a token means.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.models import native
from flashdraft.models.attention import Places, additive_masks
from flashdraft.models.blocks import Block, PackedBlock
from flashdraft.models.cache import SlotCache, round_up
from flashdraft.models.convolution import Kernels, convolved, kernels_of
from flashdraft.models.layers import GROWING, CosSin, Linear, Rotary, apply_rotary, pack_as
from flashdraft.process import INTS

__all__ = ["Decoder", "KeysValues", "Layout", "Output"]

T = TypeVar("T")

KeysValues = tuple[Tensor, Tensor]  # of one layer: [rows, kv_heads, slots, head_dim]
# States, and the wanted layers' outputs side by side if there are any.
Output = tuple[Tensor, Tensor | None]
AtTokens = tuple[Tensor, Tensor]  # [tokens] each: their positions, and their places in their rows
# Layer; q, k, v [tokens, heads, head_dim] -> [tokens, heads * head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Layout(NamedTuple):
    """How the nodes of a pass belong together, row by row."""

    seen: Tensor  # bool [rows, nodes, nodes]: who sees whom
    depths: Tensor  # [rows, nodes]: positions behind the row's length
    sizes: Tensor  # [rows]: nodes that count; the rest is padding


class Decoder:
    """Blocks and the norm behind them, packed.

    rotary: of the blocks that have none of their own.
    """

    def __init__(
        self,
        blocks: Iterable[Block | PackedBlock],
        norm: Tensor,
        *,
        rotary: Rotary,
        eps: float,
        kernel: str = "compact",
        consume: bool = False,
    ) -> None:
        """consume: a block's sources lose their weights as these are packed.

        kernel: a format of native.NativeLinear, torch or compiled. What the C++ kernels cannot
        take runs on torch; what ran in the end is in `kernel` and `formats`.
        """
        kept = list(blocks)
        self.norm = norm.contiguous()
        self.eps = eps
        self.hidden_size = len(norm)
        self.norms = [block.norms for block in kept]
        self.bases = [block.bases for block in kept]
        self.masks = [block.mask for block in kept]
        rotary_of_block = []
        for block in kept:
            rotary_of_block.append(rotary if block.rotary is None else block.rotary)
        # Those that are there, and which of them each block has.
        self.rotaries, self.which = _distinct(rotary_of_block)

        qkv_size, _ = kept[0].shape("qkv")
        _, q_size = kept[0].shape("out")
        _, self.inner = kept[0].shape("down")
        self.head_dim = 2 * len(rotary.inv_freq)
        self.heads = q_size // self.head_dim
        self.kv_heads = (qkv_size - q_size) // self.head_dim // 2
        self.q_size = self.heads * self.head_dim
        self.kv_size = self.kv_heads * self.head_dim
        self.taps, self.conv_groups = _convolution_shape(kept[0])

        self.native = self._fits_kernels() and kernel not in ("torch", "compiled")
        self.kernel = kernel if self.native or kernel == "compiled" else "torch"
        self.linears: list[dict[str, Linear]] = []
        for block in kept:
            self.linears.append(self._packed_block(block, consume=consume))

        self.row_exact = True
        self.nbytes = 0
        formats = set()
        for linear in self.all_linears():
            self.row_exact = self.row_exact and linear.row_exact
            self.nbytes += linear.nbytes
            formats.add(linear.format)
        self.formats = sorted(formats)

        self._model = self._native_model() if self.native else None
        self.attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        # Set it to a float64 [3]: linears, attention and the rest add up there.
        self.seconds: Tensor | None = None

    def __call__(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        x: Tensor,
        layout: Layout,
        layers: Sequence[int],
    ) -> Output:
        """Read nodes behind the rows' lengths, which stay. x: [rows, nodes, hidden].

        slots: the cache's rows. Padding comes back as zeros.
        Returns the final normed state [rows, nodes, hidden] and the wanted layers' outputs side by
        side.
        """
        if self._model is not None:
            native.call_team()

        width = x.shape[1]
        counts = layout.sizes.tolist()
        lengths = [cache.lengths[slot] for slot in slots]
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        needed = max(ends)
        fewest = min(counts)
        native.ensure(needed <= cache.slots, "the cache has too few slots")
        native.ensure(0 <= min(slots) <= max(slots) < cache.rows, "no such row in the cache")
        native.ensure(
            1 <= fewest <= max(counts) <= width, "a row with more nodes than there are, or none"
        )
        self.reserve(needed)

        starts = torch.tensor(lengths, **INTS)
        real = torch.arange(width, **INTS) < layout.sizes[:, None]  # nothing below sees padding
        packed = x.flatten(0, 1) if fewest == width else x[real]
        if self._model is not None:
            states, features = self._native_pass(cache, slots, packed, starts, layout, layers)
        else:
            at_tokens, attend = self._torch_attention(cache, slots, starts, layout, real)
            states, features = self.run(packed, at_tokens, attend, layers)

        if features is not None:
            features = _spread(features, real)
        return _spread(states, real), features

    def reserve(self, num_positions: int) -> bool:
        """Room for so many positions in the rotary tables; whether they had to grow."""
        with GROWING:
            grown = [rotary.reserve(num_positions) for rotary in self.rotaries]
            if self._model is not None:
                self._model.cos, self._model.sin = self._table_pointers()
            return any(grown)

    def all_linears(self) -> list[Linear]:
        """Every block's, in their order."""
        found: list[Linear] = []
        for linears in self.linears:
            found.extend(linears.values())
        return found

    def slots_of(self, cache: SlotCache) -> list[KeysValues]:
        """Every layer's keys and values."""
        like = self.norm.new_empty(self.kv_heads, 0, self.head_dim)
        return [cache.layer(index, like) for index in range(len(self.norms))]

    # ---- what the kernels can take, and packing for them -----------------------------------------

    def odd_size(self) -> str | None:
        """The first size that the C++ kernels cannot take, in words, or None."""
        sizes = {
            "hidden size": (self.hidden_size, 32),
            "head size (head_dim)": (self.head_dim, 16),
            "heads times head size": (self.q_size, 32),
            "intermediate size": (self.inner, 32),
        }
        if self.taps:
            sizes["convolutions' group size"] = (self.hidden_size // self.conv_groups, 16)
        for name, (size, step) in sizes.items():
            if size % step:
                return f"its {name} is {size}, which is no multiple of {step}"
        if self.head_dim > 256:
            return f"its head size (head_dim) is {self.head_dim}, which is above 256"
        return None

    def _fits_kernels(self) -> bool:
        """Whether the C++ kernels can run all blocks: with one mask, no window, one table."""
        if not native.usable(self.norm):
            return False
        if len(set(self.masks)) > 1 or len(self.rotaries) > 1:
            return False
        if self.masks[0].window is not None:
            return False
        return self.odd_size() is None

    def _packed_block(self, block: Block | PackedBlock, *, consume: bool) -> dict[str, Linear]:
        if isinstance(block, PackedBlock):
            return dict(block.linears)
        linears = {}
        for name in block.parts:
            # No name for the fused weight: it has to be gone when the next one is made.
            linears[name] = self._packed(name, *block.fused(name))
            if consume:
                block.let_go(name)
        return linears

    def _packed(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        if self.native and name == "gate_up":
            weight = _interleaved(weight)
            bias = None if bias is None else _interleaved(bias)
        return pack_as(self.kernel, weight, bias)

    # ---- a pass by torch's operations ------------------------------------------------------------

    def run(self, x: Tensor, at_tokens: AtTokens, attend: Attend, layers: Sequence[int]) -> Output:
        """The final normed states and the wanted layers' outputs side by side. x: [tokens, hidden].

        A row's tokens come one behind the other.
        """
        positions, places = at_tokens
        angles = [rotary.at(positions) for rotary in self.rotaries]
        wanted: dict[int, Tensor] = {}
        for index, (norms, linears) in enumerate(zip(self.norms, self.linears, strict=True)):
            normed = self._normed(x, norms["input_norm"])
            before, behind = self._kernels(index, "attention_conv", normed)
            qkv = linears["qkv"](convolved(normed, before, places))
            q, k, v = self._split_heads(qkv, norms, angles[self.which[index]])
            attended = attend(index, q, k, v)
            x = x + convolved(linears["out"](attended), behind, places)

            normed = self._normed(x, norms["post_norm"])
            before, behind = self._kernels(index, "mlp_conv", normed)
            gate_up = linears["gate_up"](convolved(normed, before, places))
            gate, up = gate_up.chunk(2, dim=-1)
            down = linears["down"](F.silu(gate) * up)
            x = x + convolved(down, behind, places)
            if index in layers:
                wanted[index] = x

        x = self._normed(x, self.norm)
        wanted[len(self.norms)] = x
        if not layers:
            return x, None
        features = [wanted[layer] for layer in layers]
        return x, torch.cat(features, dim=-1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _kernels(self, layer: int, name: str, normed: Tensor) -> Kernels:
        """Of one of a block's convolutions, or nothing where it has none."""
        base = self.bases[layer].get(name)
        if base is None:
            return None, None
        return kernels_of(base, self.linears[layer][name], normed)

    def _split_heads(
        self, qkv: Tensor, norms: dict[str, Tensor], angles: CosSin
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [tokens, heads, head_dim] of qkv [tokens, all heads * head_dim].

        q and k are normed, where the block does that, and rotated.
        """
        q_and_k = (self.heads, self.kv_heads)
        by_head = qkv.view(len(qkv), -1, self.head_dim)
        qk, v = by_head.split((sum(q_and_k), self.kv_heads), dim=1)
        if "q_norm" in norms:
            q, k = qk.split(q_and_k, dim=1)
            q = self._normed(q, norms["q_norm"])
            k = self._normed(k, norms["k_norm"])
            qk = torch.cat((q, k), dim=1)

        rotated = apply_rotary(qk, *angles)
        q, k = rotated.split(q_and_k, dim=1)
        return q, k, v

    def attend_to(
        self, kv: Sequence[KeysValues], starts: Tensor, seen: Tensor, at: Places
    ) -> Attend:
        """Attention of all rows and nodes in one call a layer, under each block's own mask.

        kv: of every layer; starts: what the rows hold [rows]; seen: [rows, nodes, nodes].
        """
        row, node, slot = at
        rows, width = seen.shape[:2]
        num_slots = kv[0][0].shape[2]
        # Query heads that share a head of keys lie beneath each other as if they were more nodes.
        groups = self.heads // self.kv_heads
        masks = {}
        additive = additive_masks(self.masks, starts, seen, num_slots, self.norm.dtype)
        for mask_of_block, own in additive.items():
            masks[mask_of_block] = own.repeat(1, groups, 1)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = kv[layer]
            keys[row, :, slot] = k
            values[row, :, slot] = v

            query = q
            if node is not None:
                query = q.new_zeros(rows, width, *q.shape[1:]).index_put((row, node), q)
            by_group = query.view(rows, width, self.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
            folded = by_group.reshape(rows, self.kv_heads, groups * width, -1)

            mask = masks[self.masks[layer]]
            out = self.attention(folded, keys, values, attn_mask=mask)
            out = out.view(rows, self.heads, width, -1).transpose(1, 2)
            by_token = out.flatten(0, 1) if node is None else out[row, node]
            return by_token.flatten(1)

        return attend

    def _torch_attention(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        starts: Tensor,
        layout: Layout,
        real: Tensor,
    ) -> tuple[AtTokens, Attend]:
        """Where the tokens are, without padding, and attention to what the rows hold.

        It reads the cache's rows from the first of `slots` to the last one, whatever lies between.
        """
        width = real.shape[1]
        first = min(slots)
        num_rows = max(slots) - first + 1
        row_range = slice(first, first + num_rows)
        longest = int(starts.max()) + width
        num_slots = min(round_up(longest), cache.slots)
        kv = []
        for all_keys, all_values in self.slots_of(cache):
            keys = all_keys[row_range, :, :num_slots]
            values = all_values[row_range, :, :num_slots]
            kv.append((keys, values))

        rows = torch.tensor(slots, **INTS) - first
        lengths = starts.new_zeros(num_rows)
        lengths[rows] = starts
        seen = layout.seen.new_zeros(num_rows, width, width)
        seen[rows] = layout.seen

        device = self.norm.device
        which, node = real.nonzero(as_tuple=True)
        positions = starts[which] + layout.depths[which, node]
        slot = starts[which] + node
        node = node.to(device)
        at = Places(rows[which].to(device), node, slot.to(device))
        attend = self.attend_to(kv, lengths.to(device), seen.to(device), at)
        return (positions.to(device), node), attend

    # ---- a pass by the C++ kernels ---------------------------------------------------------------

    def _native_pass(
        self,
        cache: SlotCache,
        slots: Sequence[int],
        x: Tensor,
        starts: Tensor,
        layout: Layout,
        layers: Sequence[int],
    ) -> Output:
        """x: [tokens, hidden], which becomes the final state."""
        assert self._model is not None
        self._check_positions(starts, layout)
        if cache.addresses is None:
            count = cache.rows * cache.slots * self.kv_size
            cache.addresses = native.addresses(self.slots_of(cache), count)

        seen = layout.seen.tril() if self.masks[0].causal else layout.seen
        rows = torch.tensor(slots, **INTS)
        shape = (rows, starts, layout.sizes, layout.depths, seen)

        # By layer, where its output begins among a token's features; -1: nobody wants it.
        wanted = [-1] * (len(self.linears) + 1)
        for i, layer in enumerate(layers):
            wanted[layer] = i * self.hidden_size

        tokens = len(x)
        qkv = x.new_empty(tokens, self.q_size + 2 * self.kv_size)
        mixed = x.new_empty(tokens, self.q_size)
        inner = x.new_empty(tokens, self.inner)
        kernels = x.new_empty(tokens, 2 * self.taps * self.conv_groups)
        behind = x.new_empty(tokens, self.hidden_size if self.taps else 0)
        features = x.new_empty(tokens, len(layers) * self.hidden_size)
        tensors = (torch.tensor(wanted, **INTS), x, qkv, mixed, inner, kernels, behind, features)
        native.step(self._model, cache.slots, shape, cache.addresses, tensors, self.seconds)
        if not layers:
            return x, None
        self._repeat_outputs(features, layers, wanted)
        return x, features

    def _repeat_outputs(
        self, features: Tensor, layers: Sequence[int], places: Sequence[int]
    ) -> None:
        """Copy a layer that was asked for twice: the kernels write it once, at its last place."""
        size = self.hidden_size
        for i, layer in enumerate(layers):
            here = i * size
            last = places[layer]
            if here != last:
                features[:, here : here + size] = features[:, last : last + size]

    def _check_positions(self, starts: Tensor, layout: Layout) -> None:
        """AssertionError for a node beyond the rotary tables; padding may lie there."""
        room = len(self.rotaries[0].tables[0])
        if int(starts.max()) + int(layout.depths.max()) < room:
            return
        real = torch.arange(layout.depths.shape[1], **INTS) < layout.sizes[:, None]
        positions = starts[:, None] + layout.depths
        last = int((positions * real).max())
        native.ensure(last < room, f"position {last} of {room}")

    def _native_model(self) -> native.Model:
        """What the kernels read of this decoder: sizes, and where everything lies."""
        self._layers = (native.Layer * len(self.linears))()
        for index, struct in enumerate(self._layers):
            self._fill_layer(struct, index)

        model = native.Model()
        model.layers = len(self.linears)
        model.hidden = self.hidden_size
        model.heads = self.heads
        model.kv_heads = self.kv_heads
        model.head_dim = self.head_dim
        model.inner = self.inner
        model.taps = self.taps
        model.conv_groups = self.conv_groups
        model.eps = self.eps
        model.layer = self._layers
        model.norm = native.pointer(self.norm, "the last norm", self.hidden_size)
        model.cos, model.sin = self._table_pointers()
        return model

    def _fill_layer(self, struct: native.Layer, index: int) -> None:
        for name, norm in self.norms[index].items():
            size = self.head_dim if name in ("q_norm", "k_norm") else self.hidden_size
            setattr(struct, name, native.pointer(norm, name, size))

        kernels = (2 * self.taps * self.conv_groups, self.hidden_size)
        shapes = {
            "qkv": (self.q_size + 2 * self.kv_size, self.hidden_size),
            "out": (self.hidden_size, self.q_size),
            "gate_up": (2 * self.inner, self.hidden_size),
            "down": (self.hidden_size, self.inner),
            "attention_conv": kernels,
            "mlp_conv": kernels,
        }
        for name, linear in self.linears[index].items():
            assert isinstance(linear, native.NativeLinear)
            shape = (linear.out_features, linear.in_features)
            native.ensure(shape == shapes[name], f"{name} is of another size")
            base = self.bases[index].get(name)
            if base is None:
                setattr(struct, name, linear.struct)
            else:
                convolution = getattr(struct, name)
                convolution.kernels = linear.struct
                size = 2 * self.taps * self.hidden_size
                convolution.base = native.pointer(base, name, size)

    def _table_pointers(self) -> list[int]:
        """Where cos and sin lie."""
        pointers = []
        for table in self.rotaries[0].tables:
            count = len(table) * self.head_dim
            pointers.append(native.pointer(table, "a rotary table", count))
        return pointers


def _distinct(items: Sequence[T]) -> tuple[list[T], list[int]]:
    """Each item once, in the order in which they first come, and for every item which one it is."""
    distinct = list(dict.fromkeys(items))
    which = [distinct.index(item) for item in items]
    return distinct, which


def _convolution_shape(block: Block | PackedBlock) -> tuple[int, int]:
    """Taps and groups of a block's convolutions; 0 and 0: it has none."""
    base = block.bases.get("attention_conv")
    if base is None:
        return 0, 0
    taps = base.shape[1]
    outputs, _ = block.shape("attention_conv")
    return taps, outputs // (2 * taps)


def _interleaved(gate_up: Tensor) -> Tensor:
    """Panels of gate and up in turn, as the kernel multiplies one with the other."""
    panels: Tensor = gate_up.unflatten(0, (2, -1, native.PANEL))
    return panels.transpose(0, 1).flatten(0, 2)


def _spread(packed: Tensor, real: Tensor) -> Tensor:
    """[tokens, size] back to [rows, nodes, size]; padding is zero."""
    if len(packed) == real.numel():
        return packed.view(*real.shape, -1)
    out = packed.new_zeros(*real.shape, packed.shape[-1])
    out[real] = packed
    return out
