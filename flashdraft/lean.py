"""A decoder of our own for llama-shaped targets: fused and packed weights, rows packed for the linears, few operations.

Built from a loaded Hugging Face model and equal to it to 1e-4. Row-exact where the linears are (layers.py), so that
the text of a chain and plain text agree bit for bit. Does not know drafters, verification or text.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdraft.cache import SlotCache
from flashdraft.layers import CHUNK, PackedLinear, SlotAttention, apply_rotary, rotary_table
from flashdraft.target import PREFILL_CHUNK, Indices, Output, Target
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
        counts, starts = sizes.tolist(), [cache.lengths[slot] for slot in slots]
        chain, tree, groups = is_chain(parents, sizes), ancestors(parents), self.heads // self.kv_heads
        real = torch.arange(tokens.shape[1]) < sizes[:, None]  # the linears see no padding
        plans = [
            SlotAttention(start, n, visible=None if chain else seen[:n, :n], groups=groups, like=self.cos)
            for start, n, seen in zip(starts, counts, tree, strict=True)
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

        depths = tree.sum(-1) - 1
        packed, positions = tokens[real], (torch.tensor(starts)[:, None] + depths)[real]
        count = len(packed)
        if count < CHUNK and len(slots) == 1:  # one row alone costs the linears more than four, and attention pads to that
            packed, positions = (F.pad(t, (0, CHUNK - count), value=int(t[-1])) for t in (packed, positions))
        hidden, features = self._run(packed, positions, attend, layers)
        logits = self.lm_head(hidden)[:count]
        return _spread(logits, real), None if features is None else _spread(features[:count], real)

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
