"""EAGLE-3 (2503.01840): one decoder layer that drafts token by token from the target's fused features and its own last state.

The layer reads pairs: the embedding of token t + 1 beside g_t, where g_t = fc(three of the target's states) for what the target
has read, and the layer's own output for what was drafted (section 3.1). q, k and v are made of both, each under its own norm;
the residual is g. Its output, normed, goes to an lm_head over a reduced vocabulary; un-normed, it is the next g. A dynamic tree
(EAGLE-2, 2406.16858) expands the likeliest paths at every depth and keeps the likeliest nodes of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Nodes, planted
from flashdraft.errors import DraftMismatch
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DraftHead, DraftNetwork
from flashdraft.models.blocks import Block
from flashdraft.models.cache import SlotCache
from flashdraft.models.layers import RMSNorm, apply_rotary
from flashdraft.models.modules import MLP
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Eagle3DraftModel", "Eagle3Drafter", "fused_layers"]

_Found = tuple[
    float, int, int, int, float
]  # a node looked at: -log-probability of its path, number, parent, token, score
_BEAM = 8  # paths that a tree expands at every depth, and tokens looked at behind each


def fused_layers(num_target_layers: int) -> tuple[int, ...]:
    """The layers whose outputs are the inputs of blocks 2, L // 2 and L - 3, as published folders mean without saying so."""
    return tuple(sorted({1, num_target_layers // 2 - 1, max(num_target_layers - 4, 0)}))


def _outputs(layers: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """The layers whose outputs a folder means that says nothing of its target's depth.

    An id as high as the target is deep is no output of a layer's: those are ids of hidden_states, one higher (NVIDIA's folders).
    """
    if not layers:
        return fused_layers(num_target_layers)
    return tuple(i - 1 for i in layers) if max(layers) == num_target_layers else tuple(layers)


def _check_layers(layers: Sequence[int], count: int, target: Target) -> None:
    """Raises DraftMismatch where the target has not the layers whose outputs the drafter reads, `count` of them."""
    if len(layers) == count and min(layers) >= 0:
        return
    got = f"the draft reads the outputs of {count} layers, which `{target.name}` with its {target.num_layers} layers has not"
    raise DraftMismatch(
        got,
        hint="it was trained for another target, or name the layers: eagle_aux_hidden_state_layer_ids",
    )


class Eagle3DraftModel(DraftNetwork):
    """The draft network, under the tensor names of SafeAILab's and SpecForge's folders."""

    method = "eagle3"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        h, d = config.hidden_size, config.head_dim
        sizes = {
            "q": config.num_attention_heads * d,
            "k": config.num_key_value_heads * d,
            "v": config.num_key_value_heads * d,
        }
        attention = {
            f"{name}_proj": nn.Linear(2 * h, size, bias=False, **FLOATS)
            for name, size in sizes.items()
        }
        attention["o_proj"] = nn.Linear(sizes["q"], h, bias=False, **FLOATS)
        norms = {
            name: RMSNorm(h, config.rms_norm_eps)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        }
        self.add_rotary()
        mlp = MLP(h, config.intermediate_size)
        self.midlayer: Any = nn.ModuleDict(
            {"self_attn": nn.ModuleDict(attention), "mlp": mlp, **norms}
        )
        self.fc = nn.Linear((len(config.target_layer_ids) or 3) * h, h, bias=False, **FLOATS)
        self.norm = RMSNorm(h, config.rms_norm_eps)

    def project(
        self, embedded: Tensor, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [n, heads, head_dim] of pairs: embeddings and states [n, hidden] at positions [n]."""
        layer, rotary = self.midlayer, self.rotary(positions)
        both = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(states)), dim=-1)
        q, k, v = (
            layer.self_attn[f"{x}_proj"](both).view(len(both), -1, self.config.head_dim)
            for x in "qkv"
        )
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, un-normed: states [n, hidden] and what attention gave [n, heads * head_dim]."""
        layer = self.midlayer
        residual = layer.hidden_norm(states) if self.config.norm_before_residual else states
        x = residual + layer.self_attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def fed_back(self, states: Tensor) -> Tensor:
        """What the next pair is made of: the layer's outputs, as they are or normed."""
        return self.norm(states) if self.config.norm_output else states

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        return functools.partial(Eagle3Drafter, _Packed(self, target))


class _Packed(DraftHead):
    """The same layer on packed linears, beside one target; shared by all drafters made from it."""

    def __init__(self, model: Eagle3DraftModel, target: Target) -> None:
        super().__init__(model, target)
        if not self.config.num_target_layers:
            layers = _outputs(model.config.target_layer_ids, target.num_layers)
            _check_layers(layers, model.fc.in_features // self.config.hidden_size, target)
            self.config = replace(
                model.config, num_target_layers=target.num_layers, target_layer_ids=layers
            )
        layer = Block(model.midlayer, self.probe)
        (self.rotary,) = model.rotaries(self.probe).values()
        self.fc = self.packed(model.fc.weight)
        self.linears = {name: self.packed(layer.fused(name)[0]) for name in layer.parts}
        states, final = (
            norm.weight.detach().to(self.probe) for norm in (model.midlayer.hidden_norm, model.norm)
        )
        self.norms = layer.norms | {"states": states, "final": final}
        self.nbytes += sum(linear.nbytes for linear in (self.fc, *self.linears.values()))

    def normed(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name], self.config.rms_norm_eps)

    def project(
        self, tokens: Tensor, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Eagle3DraftModel.project, from token ids."""
        heads, kv_heads, head_dim = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )
        both = torch.cat(
            (self.normed(self.embed(tokens), "input_norm"), self.normed(states, "states")), dim=-1
        )
        qk, v = (
            self.linears["qkv"](both)
            .view(len(both), -1, head_dim)
            .split((heads + kv_heads, kv_heads), dim=1)
        )
        self.rotary.reserve(int(positions.max()) + 1)
        q, k = apply_rotary(qk, *self.rotary.at(positions)).split((heads, kv_heads), dim=1)
        return q, k, v

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        residual = self.normed(states, "states") if self.config.norm_before_residual else states
        x = residual + self.linears["out"](attended)
        gate, up = self.linears["gate_up"](self.normed(x, "post_norm")).chunk(2, dim=-1)
        return x + self.linears["down"](F.silu(gate) * up)

    def fed_back(self, states: Tensor) -> Tensor:
        """As Eagle3DraftModel.fed_back."""
        return self.normed(states, "final") if self.config.norm_output else states

    def likely(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of un-normed states."""
        return super().likely(self.normed(hidden, "final"), count)


class Eagle3Drafter(Drafter):
    """Chosen nodes: the likeliest chain of `block_size` - 1 tokens, or the likeliest tree of `tree_nodes` nodes as deep.

    A pair waits until its token is known: the last state read belongs to the anchor, which is committed a step later.
    """

    name = "eagle3"

    def __init__(
        self, network: _Packed, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        self.network, self.tree_nodes = network, tree_nodes
        self.depth = (block_size or network.config.block_size) - 1
        self.layers = network.config.target_layer_ids
        self.cache = SlotCache(1, 1, 256)
        self.caches: tuple[SlotCache, ...] = (self.cache,)
        self._states: dict[int, Tensor] = {}  # by slot: g of the last position read

    @undisturbed
    @torch.inference_mode()
    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Pairs of what was read: keys and values, once."""
        assert features is not None
        self.cache.reserve(0, rows=max(rows.slots) + 1)
        for slot, new, seen in zip(rows.slots, tokens, features, strict=True):
            states = self.network.fc(seen)
            paired = torch.cat((self._states.get(slot, states[:0]), states))[:-1]
            start = self.cache.lengths[slot]
            if count := len(paired):
                own = new[len(new) - count :]
                _, k, v = self.network.project(
                    own, paired, torch.arange(start, start + count, **INTS)
                )
                self.cache.reserve(start + count)
                self.cache.write(0, slot, k.transpose(0, 1), v.transpose(0, 1))
                self.cache.keep(slot, range(count))
            self._states[slot] = states[-1:]

    @undisturbed
    @serial(lambda self: self.network.native)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """A forward of the layer for every depth."""
        depth = min(self.depth, max_nodes - 1)
        budget = min(self.tree_nodes or depth + 1, max_nodes) - 1
        grown = [NOTHING] * len(rows)
        for i, (slot, anchor) in enumerate(zip(rows.slots, rows.anchors, strict=True)):
            if depth > 0:
                self.network.tell(self.cache.lengths[slot] + depth)
                grown[i] = self._grow(slot, anchor, depth, budget)
        return planted(rows.anchors, grown)

    def end(self, rows: Rows) -> None:
        for slot in set(rows.slots) & set(range(self.cache.rows)):
            self.cache.free(slot)
            self._states.pop(slot, None)

    def _grow(self, slot: int, anchor: int, depth: int, budget: int) -> Nodes:
        """The likeliest tree of `budget` nodes among all that a beam looks at; with a beam of one, a chain."""
        net, start, width = self.network, self.cache.lengths[slot], _BEAM if self.tree_nodes else 1
        tokens, states = torch.tensor([anchor], **INTS), self._states[slot]
        paths, joint = (
            [-1],
            torch.zeros(1, 1, **FLOATS),
        )  # of the beam: its nodes' numbers, and their paths' log-probabilities
        found: list[_Found] = []
        own: tuple[Tensor, Tensor] | None = (
            None  # keys and values [kv_heads, n, head_dim] of the beams, in order
        )
        seen = torch.zeros(1, 0, **BOOLS)  # which of them each path of the beam goes through
        for level in range(depth):
            q, k, v = net.project(tokens, states, torch.full_like(tokens, start + level))
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            own = (k, v) if own is None else (torch.cat((own[0], k), 1), torch.cat((own[1], v), 1))
            seen = torch.cat((seen, torch.eye(len(tokens), **BOOLS)), 1)
            states = net.finish(states.expand(len(tokens), -1), self._attend(slot, q, own, seen))
            ids, scores = (t.cpu() for t in net.likely(states, width))
            total = joint + scores
            numbers = len(found) + torch.arange(total.numel(), **INTS).view_as(total)
            parents = torch.tensor(paths, **INTS)[:, None].expand_as(total)
            found += zip(
                *(t.flatten().tolist() for t in (-total, numbers, parents, ids, scores)),
                strict=True,
            )
            best = total.flatten().topk(min(width, total.numel())).indices
            came = best // total.shape[1]
            tokens, joint = ids.flatten()[best], total.flatten()[best][:, None]
            states = net.fed_back(states)
            paths, states, seen = numbers.flatten()[best].tolist(), states[came], seen[came]
        return _kept(found, budget)

    def _attend(self, slot: int, q: Tensor, own: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """q [n, heads, head_dim] over the row's pairs and, of the beams' own keys, those that `seen` [n, m] shows."""
        keys, values = self.cache.layer(0, own[0])
        length = self.cache.lengths[slot]
        k, v = (
            torch.cat((past[slot, :, :length], new), 1)
            for past, new in zip((keys, values), own, strict=True)
        )
        mask = torch.cat((torch.ones(len(q), length, **BOOLS), seen), 1).to(q.device)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


def _kept(found: list[_Found], budget: int) -> Nodes:
    """The likeliest nodes. No parent is less likely than its child, and its number is lower: it is kept and stands before it."""
    best = sorted(found)[:budget]
    place = {-1: 0} | {number: i for i, (_, number, _, _, _) in enumerate(best, 1)}
    return Nodes(
        [token for *_, token, _ in best],
        [place[parent] for _, _, parent, _, _ in best],
        [score for *_, score in best],
    )
