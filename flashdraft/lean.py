"""A decoder of our own for llama-shaped targets: fused and packed weights, rows packed for the linears, few operations.

Built from a loaded Hugging Face model and equal to it to 1e-4. Row-exact where the linears are (layers.py), so that
the text of a chain and plain text agree bit for bit. Does not know drafters, verification or text.
"""

import ctypes
from collections.abc import Callable
from ctypes import c_void_p
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft import native
from flashdraft.cache import SlotCache, round_up
from flashdraft.layers import CHUNK, PackedLinear, SlotAttention, apply_rotary, rotary_table
from flashdraft.target import PREFILL_CHUNK, Indices, Output, Target, additive, visible_slots
from flashdraft.tree import ancestors, is_chain

__all__ = ["LeanTarget"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer; q, k, v [tokens, heads, head_dim] -> [tokens, heads * head_dim]


class _Layer:
    """One block's weights, fused: q, k, v in one linear, gate and up in another."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        norms = block.input_layernorm, block.post_attention_layernorm
        self.input_norm, self.post_norm = (norm.weight.detach() for norm in norms)
        self.qkv = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _fuse(attention.o_proj)
        self.gate_up = _fuse(mlp.gate_proj, mlp.up_proj)
        self.down = _fuse(mlp.down_proj)
        self.q_norm = attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None


class LeanTarget(Target):
    """llama, mistral, qwen2 or qwen3 behind the Target contract (target.py)."""

    def __init__(self, model: Any, name: str) -> None:
        config, decoder = model.config, model.model
        self.name, self.config = name, config
        self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
        self.num_layers, self.context_length = int(config.num_hidden_layers), int(config.max_position_embeddings)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or self.hidden_size // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.blocks = [_Layer(block) for block in decoder.layers]
        self.norm = decoder.norm.weight.detach()
        self.embedding = decoder.embed_tokens.weight.detach()
        self.head = _fuse(model.lm_head)
        self._head_rows: Tensor = model.lm_head.weight.detach()  # the embedding itself where the two are tied
        rotary = decoder.rotary_emb
        self.cos, self.sin = rotary_table(rotary.inv_freq, self.context_length, rotary.attention_scaling, self.embedding.dtype)
        linears = [self.head, *(linear for b in self.blocks for linear in (b.qkv, b.out, b.gate_up, b.down))]
        self.row_exact = all(linear.row_exact for linear in linears)
        dtype = str(self.embedding.dtype).removeprefix("torch.")
        self.kernel = f"{'oneDNN prepacked' if self.head.packed else 'torch'} {dtype}"
        self.nbytes = sum(linear.nbytes for linear in linears) + self.embedding.nbytes

    @staticmethod
    def fits(config: Any) -> bool:
        """Whether this decoder computes what the Hugging Face model does: plain SiLU blocks, full attention, static rotary."""
        rope = getattr(config, "rope_parameters", None) or {}
        plain = getattr(config, "hidden_act", None) == "silu" and not set(getattr(config, "layer_types", None) or ()) - {
            "full_attention"
        }
        static = rope.get("rope_type", "default") in ROPE_TYPES and float(rope.get("partial_rotary_factor", 1.0)) == 1.0
        windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None)
        return config.model_type in FAMILIES and plain and static and not windowed

    @torch.inference_mode()
    def prefill(self, cache: SlotCache, slot: int, tokens: Tensor, layers: Indices) -> Output:
        features = []
        for chunk in tokens.split(PREFILL_CHUNK):
            start, count = cache.lengths[slot], len(chunk)
            mask = torch.ones(count, start + count, dtype=torch.bool).tril(start)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
                keys, values = cache.write(layer, slot, k.transpose(0, 1), v.transpose(0, 1))
                seen = mask.shape[1]
                args = (q.transpose(0, 1)[None], keys[None, :, :seen], values[None, :, :seen])
                out = F.scaled_dot_product_attention(*args, attn_mask=mask, enable_gqa=True)
                return out[0].transpose(0, 1).reshape(len(q), -1)

            hidden, feature = self._run(chunk, torch.arange(start, start + count), attend, layers)
            cache.keep(slot, range(count))
            features += [] if feature is None else [feature]
        return self.lm_head(hidden[-1:])[0], torch.cat(features) if features else None

    @torch.inference_mode()
    def forward(
        self, cache: SlotCache, slots: Indices, tokens: Tensor, parents: Tensor, sizes: Tensor, layers: Indices
    ) -> Output:
        starts, tree = torch.tensor([cache.lengths[slot] for slot in slots]), ancestors(parents)
        real = torch.arange(tokens.shape[1]) < sizes[:, None]  # the linears see no padding
        together = len(slots) > 1 and not self.row_exact  # no bits to keep: one call for all rows
        attend = (self._together if together else self._row_by_row)(cache, slots, starts, is_chain(parents, sizes), tree, real)
        depths = tree.sum(-1) - 1
        packed, positions = tokens[real], (starts[:, None] + depths)[real]
        count = len(packed)
        if count < CHUNK and len(slots) == 1:  # one row alone costs the linears more than four, and attention pads to that
            packed, positions = (F.pad(t, (0, CHUNK - count), value=int(t[-1])) for t in (packed, positions))
        hidden, features = self._run(packed, positions, attend, layers)
        logits = self.lm_head(hidden)[:count]
        return _spread(logits, real), None if features is None else _spread(features[:count], real)

    def _row_by_row(
        self, cache: SlotCache, slots: Indices, starts: Tensor, chain: bool, tree: Tensor, real: Tensor
    ) -> Attend:
        counts, groups = real.sum(1).tolist(), self.heads // self.kv_heads
        plans = [
            SlotAttention(start, n, visible=None if chain else seen[:n, :n], groups=groups, like=self.cos)
            for start, n, seen in zip(starts.tolist(), counts, tree, strict=True)
        ]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs, first = [], 0
            for slot, count, plan in zip(slots, counts, plans, strict=True):
                last = first + count
                keys, values = cache.write(layer, slot, k[first:last].transpose(0, 1), v[first:last].transpose(0, 1))
                alone = q if len(plans) == 1 else q[first:last]
                outputs.append(plan(alone, keys, values, self.head_dim**-0.5))
                first = last
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend

    def _together(self, cache: SlotCache, slots: Indices, starts: Tensor, _: bool, tree: Tensor, real: Tensor) -> Attend:
        rows, width, groups = max(slots) + 1, real.shape[1], self.heads // self.kv_heads
        reads = min(round_up(int(starts.max()) + width), cache.slots)
        row = torch.tensor(slots)[:, None].expand_as(real)[real]
        node = torch.arange(width).expand_as(real)[real]
        place = (starts[:, None] + torch.arange(width))[real]
        seen = torch.zeros(rows, width, reads, dtype=torch.bool)
        seen[:, :, 0] = True  # whoever is padding reads something
        seen[list(slots)] |= visible_slots(starts, tree, reads)
        mask = additive(seen.repeat(1, groups, 1), self.cos.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.layer(layer, k.transpose(0, 1))
            keys[row, :, place], values[row, :, place] = k, v
            query = q.new_zeros(rows, width, *q.shape[1:])
            query[row, node] = q
            query = query.view(rows, width, self.kv_heads, groups, -1).permute(0, 2, 3, 1, 4)
            folded = query.reshape(rows, self.kv_heads, groups * width, -1)
            out = F.scaled_dot_product_attention(folded, keys[:rows, :, :reads], values[:rows, :, :reads], attn_mask=mask)
            return out.view(rows, self.heads, width, -1).transpose(1, 2)[row, node].flatten(1)

        return attend

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding)

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self.head(hidden.reshape(-1, self.hidden_size)).view(*hidden.shape[:-1], self.vocab_size)

    def head_weight(self, tokens: Tensor) -> Tensor:
        return self._head_rows[tokens]

    def _run(self, tokens: Tensor, positions: Tensor, attend: Attend, layers: Indices) -> Output:
        """tokens, positions: [n] -> the final normed state [n, hidden], and the wanted layers' outputs side by side."""
        x = self.embed(tokens)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        wanted: dict[int, Tensor] = {}
        num_qk = self.heads + self.kv_heads
        for index, block in enumerate(self.blocks):
            qkv = block.qkv(F.rms_norm(x, (self.hidden_size,), block.input_norm, self.eps)).view(len(x), -1, self.head_dim)
            qk, v = qkv[:, :num_qk], qkv[:, num_qk:]
            if block.q_norm is not None and block.k_norm is not None:
                q = F.rms_norm(qk[:, : self.heads], (self.head_dim,), block.q_norm, self.eps)
                k = F.rms_norm(qk[:, self.heads :], (self.head_dim,), block.k_norm, self.eps)
                qk = torch.cat((q, k), dim=1)
            qk = apply_rotary(qk, cos, sin)
            x = x + block.out(attend(index, qk[:, : self.heads], qk[:, self.heads :], v))
            gate, up = block.gate_up(F.rms_norm(x, (self.hidden_size,), block.post_norm, self.eps)).chunk(2, dim=-1)
            x = x + block.down(F.silu(gate) * up)
            if index in layers:
                wanted[index] = x
        x = F.rms_norm(x, (self.hidden_size,), self.norm, self.eps)
        wanted[self.num_layers] = x
        return x, torch.cat([wanted[i] for i in layers], dim=-1) if layers else None


class NativeTarget(LeanTarget):
    """The same decoder with a whole step in one call of the C++ kernels; row-exact for chains, trees and prompts alike."""

    def __init__(self, model: Any, name: str, *, kernel: str = "compact") -> None:
        super().__init__(model, name)
        self.format = kernel
        pack = partial(_native, kernel)
        self._structs = (native.Layer * self.num_layers)()
        self._kept: list[Any] = [self.norm, self.cos, self.sin]
        self.inner = 0
        for struct, block in zip(self._structs, model.model.layers, strict=True):
            attention, mlp = block.self_attn, block.mlp
            self.inner = mlp.gate_proj.weight.shape[0]
            pairs = [linear.weight.detach().unflatten(0, (-1, native.PANEL)) for linear in (mlp.gate_proj, mlp.up_proj)]
            gate_up = torch.stack(pairs, dim=1).flatten(0, 2)
            linears = {
                "qkv": pack(*_joined(attention.q_proj, attention.k_proj, attention.v_proj)),
                "out": pack(*_joined(attention.o_proj)),
                "gate_up": pack(gate_up, None),
                "down": pack(*_joined(mlp.down_proj)),
            }
            for part, linear in linears.items():
                setattr(struct, part, linear.struct)
            norms = {"input_norm": block.input_layernorm, "post_norm": block.post_attention_layernorm}
            norms |= {key: getattr(attention, key) for key in ("q_norm", "k_norm") if hasattr(attention, key)}
            for part, norm in norms.items():
                setattr(struct, part, norm.weight.data_ptr())
            self._kept += [linears, norms]
        self.head = pack(self._head_rows, None)
        sizes = self.num_layers, self.hidden_size, self.heads, self.kv_heads, self.head_dim, self.inner, self.eps
        self._model = native.Model(*sizes, self._structs, *(t.data_ptr() for t in (self.norm, self.cos, self.sin)))
        self.row_exact = True

    @torch.inference_mode()
    def prefill(self, cache: SlotCache, slot: int, tokens: Tensor, layers: Indices) -> Output:
        features = []
        for chunk in tokens.split(128):
            start, count = cache.lengths[slot], len(chunk)
            nodes = torch.arange(count)
            seen = torch.ones(count, count, dtype=torch.bool).tril()
            hidden, feature = self._step(cache, chunk, torch.full((count,), slot), torch.full((count,), start), nodes, seen, layers)
            cache.keep(slot, range(count))
            features += [] if feature is None else [feature]
        return self.lm_head(hidden[-1:])[0], torch.cat(features) if features else None

    @torch.inference_mode()
    def forward(
        self, cache: SlotCache, slots: Indices, tokens: Tensor, parents: Tensor, sizes: Tensor, layers: Indices
    ) -> Output:
        starts, tree = torch.tensor([cache.lengths[slot] for slot in slots]), ancestors(parents)
        real = torch.arange(tokens.shape[1]) < sizes[:, None]
        rows, nodes = torch.tensor(slots)[:, None].expand_as(real), torch.arange(tokens.shape[1]).expand_as(real)
        hidden, features = self._step(
            cache, tokens[real], rows[real], starts[:, None].expand_as(real)[real], nodes[real], tree[real], layers
        )
        return _spread(self.lm_head(hidden), real), None if features is None else _spread(features, real)

    def _step(self, cache, tokens, rows, starts, nodes, seen, layers) -> Output:
        """One pass; all arguments by token. seen: [n, nodes of its row] which nodes it sees, itself the last of them."""
        n = len(tokens)
        depth = seen.sum(-1)
        order = torch.where(seen, torch.arange(seen.shape[1]), seen.shape[1]).sort(-1).values
        like = self.embedding.new_empty(0).view(self.kv_heads, 0, self.head_dim)
        pairs = [cache.layer(i, like) for i in range(self.num_layers)]
        keys, values = ((c_void_p * self.num_layers)(*(p[i].data_ptr() for p in pairs)) for i in (0, 1))
        wanted = [-1] * (self.num_layers + 1)
        for i, layer in enumerate(layers):
            wanted[layer] = i * self.hidden_size
        x = self.embed(tokens).contiguous()
        qkv, mixed = x.new_empty(n, (self.heads + 2 * self.kv_heads) * self.head_dim), x.new_empty(n, self.heads * self.head_dim)
        inner, features = x.new_empty(n, self.inner), x.new_empty(n, len(layers) * self.hidden_size)
        ints = [t.contiguous() for t in (rows, starts, starts + nodes, starts + depth - 1, depth, order)]
        wants = torch.tensor(wanted)
        step = native.Step(
            n, cache.slots, seen.shape[1], features.shape[1], torch.get_num_threads(), *(t.data_ptr() for t in ints),
            ctypes.cast(keys, c_void_p), ctypes.cast(values, c_void_p), wants.data_ptr(),
            *(t.data_ptr() for t in (x, qkv, mixed, inner, features)),
        )
        native.library().flashdraft_step(ctypes.byref(self._model), ctypes.byref(step))
        return x, features if layers else None


def _native(kernel, weight, bias):
    return native.NativeLinear(weight, bias, format=native.narrowest(weight) if kernel == "compact" else kernel)


def _joined(*linears: Any) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _fuse(*linears: Any) -> PackedLinear:
    weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return PackedLinear(weight, torch.cat(biases) if biases else None)


def _spread(packed: Tensor, real: Tensor) -> Tensor:
    """[tokens, ...] back to [rows, nodes, ...]; padding is zero."""
    if bool(real.all()):
        return packed.view(*real.shape, packed.shape[-1])
    out = packed.new_zeros((*real.shape, packed.shape[-1]))
    out[real] = packed
    return out
