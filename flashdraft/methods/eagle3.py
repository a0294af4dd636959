"""EAGLE-3 (2503.01840): one decoder layer that drafts token by token from the target's fused
features and its own last state.

The layer reads pairs: the embedding of token t + 1 beside g_t, where g_t = fc(three of the target's
states) for what the target has read, and the layer's own output for what was drafted (section 3.1).
q, k and v are made of both, each under its own norm; the residual is g. Its output, normed, goes to
an lm_head over a reduced vocabulary; un-normed, it is the next g. A dynamic tree (EAGLE-2,
2406.16858) expands the likeliest paths at every depth and keeps the likeliest nodes of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Nodes, planted
from flashdraft.errors import DraftMismatch
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DraftHead, DraftNetwork, Likely, top
from flashdraft.models.blocks import Block
from flashdraft.models.cache import SlotCache
from flashdraft.models.layers import RMSNorm, apply_rotary
from flashdraft.models.modules import MLP
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Eagle3DraftModel", "Eagle3Drafter", "fused_layers"]

_BEAM = 8  # paths that a tree expands at every depth, and tokens looked at behind each


# --- Which layers it reads


def fused_layers(num_target_layers: int) -> tuple[int, ...]:
    """The layers whose outputs are the inputs of blocks 2, L // 2 and L - 3, as published folders
    mean without saying so."""
    layers = {1, num_target_layers // 2 - 1, max(num_target_layers - 4, 0)}
    return tuple(sorted(layers))


def _outputs(layers: Sequence[int], num_target_layers: int) -> tuple[int, ...]:
    """The layers whose outputs a folder means that says nothing of its target's depth.

    An id as high as the target is deep is no output of a layer's: those are ids of hidden_states,
    one higher (NVIDIA's folders).
    """
    if not layers:
        return fused_layers(num_target_layers)
    if max(layers) == num_target_layers:
        return tuple(layer - 1 for layer in layers)
    return tuple(layers)


def _check_layers(layers: Sequence[int], count: int, target: Target) -> None:
    """Raises DraftMismatch where the target has not the layers whose outputs the drafter reads,
    `count` of them."""
    if len(layers) == count and min(layers) >= 0:
        return

    got = (
        f"the draft reads the outputs of {count} layers, "
        f"which `{target.name}` with its {target.num_layers} layers has not"
    )
    hint = "it was trained for another target, or name the layers: eagle_aux_hidden_state_layer_ids"
    raise DraftMismatch(got, hint=hint)


# --- The network


class _Attention(nn.Module):
    """Projections of embedding and state side by side."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * hidden, queries, bias=False, **FLOATS)
        self.k_proj = nn.Linear(2 * hidden, keys, bias=False, **FLOATS)
        self.v_proj = nn.Linear(2 * hidden, keys, bias=False, **FLOATS)
        self.o_proj = nn.Linear(queries, hidden, bias=False, **FLOATS)


class _Layer(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        self.self_attn = _Attention(config)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)  # of the embedding
        self.hidden_norm = RMSNorm(hidden, eps)  # of the state
        self.post_attention_layernorm = RMSNorm(hidden, eps)


class Eagle3DraftModel(DraftNetwork):
    """The draft network, under the tensor names of SafeAILab's and SpecForge's folders."""

    method = "eagle3"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        num_features = len(config.target_layer_ids)
        if num_features == 0:
            num_features = 3  # fused_layers
        self.add_rotary()
        self.midlayer = _Layer(config)
        self.fc = nn.Linear(num_features * hidden, hidden, bias=False, **FLOATS)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)

    def project(
        self, embedded: Tensor, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [n, heads, head_dim] of pairs: embeddings and states [n, hidden] at positions
        [n]."""
        layer = self.midlayer
        rotary = self.rotary(positions)
        embedding = layer.input_layernorm(embedded)
        state = layer.hidden_norm(states)
        pairs = torch.cat((embedding, state), dim=-1)
        q = self._heads(layer.self_attn.q_proj(pairs))
        k = self._heads(layer.self_attn.k_proj(pairs))
        v = self._heads(layer.self_attn.v_proj(pairs))
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def _heads(self, projected: Tensor) -> Tensor:
        """[n, heads * head_dim] -> [n, heads, head_dim]"""
        return projected.view(len(projected), -1, self.config.head_dim)

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, un-normed: states [n, hidden] and what attention gave
        [n, heads * head_dim]."""
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
        self.linears = {}
        for name in layer.parts:
            weight, _ = layer.fused(name)
            self.linears[name] = self.packed(weight)
        self.norms = dict(layer.norms)
        self.norms["states"] = model.midlayer.hidden_norm.weight.detach().to(self.probe)
        self.norms["final"] = model.norm.weight.detach().to(self.probe)
        self.nbytes += self.fc.nbytes
        self.nbytes += sum(linear.nbytes for linear in self.linears.values())

    def normed(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name], self.config.rms_norm_eps)

    def project(
        self, tokens: Tensor, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Eagle3DraftModel.project, from token ids."""
        heads = self.config.num_attention_heads
        kv_heads = self.config.num_key_value_heads
        embedded = self.normed(self.embed(tokens), "input_norm")
        pairs = torch.cat((embedded, self.normed(states, "states")), dim=-1)
        qkv = self.linears["qkv"](pairs).view(len(pairs), -1, self.config.head_dim)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        self.rotary.reserve(int(positions.max()) + 1)
        rotated = apply_rotary(qk, *self.rotary.at(positions))
        q, k = rotated.split((heads, kv_heads), dim=1)
        return q, k, v

    def finish(self, states: Tensor, attended: Tensor) -> Tensor:
        """As Eagle3DraftModel.finish."""
        residual = self.normed(states, "states") if self.config.norm_before_residual else states
        x = residual + self.linears["out"](attended)
        normed = self.normed(x, "post_norm")
        gate, up = self.linears["gate_up"](normed).chunk(2, dim=-1)
        return x + self.linears["down"](F.silu(gate) * up)

    def fed_back(self, states: Tensor) -> Tensor:
        """As Eagle3DraftModel.fed_back."""
        return self.normed(states, "final") if self.config.norm_output else states

    def likely(self, hidden: Tensor, count: int) -> Likely:
        """Of un-normed states."""
        return super().likely(self.normed(hidden, "final"), count)


# --- The drafter


class _Found(NamedTuple):
    """A node that was looked at, as nodes are sorted: the likeliest path first."""

    cost: float  # its path's negative log-probability
    number: int  # in the order in which nodes were looked at
    parent: int  # its number; -1: the anchor
    token: int
    score: float  # its own log-probability


class _Beam(NamedTuple):
    """The paths that are expanded next, all of one depth."""

    numbers: list[int]  # of their last nodes; -1: the anchor
    tokens: Tensor  # [paths]
    joint: Tensor  # [paths, 1] the paths' log-probabilities
    states: Tensor  # [1 or paths, hidden] g beside each token
    seen: Tensor  # [paths, n] bool: through which of the drafted pairs so far each path goes


class Eagle3Drafter(Drafter):
    """Chosen nodes: the likeliest chain of `block_size` - 1 tokens, or the likeliest tree of
    `tree_nodes` nodes as deep.

    A pair waits until its token is known: the last state read belongs to the anchor, which is
    committed a step later.
    """

    name = "eagle3"

    def __init__(
        self, network: _Packed, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        config = network.config
        self.network = network
        self.tree_nodes = tree_nodes
        self.depth = (config.block_size if block_size is None else block_size) - 1
        self.layers = config.target_layer_ids
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
            waiting = self._states.get(slot, states[:0])
            paired = torch.cat((waiting, states))[:-1]
            if len(paired) > 0:
                self._read(slot, new[len(new) - len(paired) :], paired)
            self._states[slot] = states[-1:]

    def _read(self, slot: int, tokens: Tensor, states: Tensor) -> None:
        """Write pairs [n] and [n, hidden] behind those that the row holds."""
        start = self.cache.lengths[slot]
        end = start + len(states)
        positions = torch.arange(start, end, **INTS)
        _, keys, values = self.network.project(tokens, states, positions)
        self.cache.reserve(end)
        self.cache.write(0, slot, keys.transpose(0, 1), values.transpose(0, 1))
        self.cache.keep(slot, range(len(states)))

    @undisturbed
    @serial(lambda self: self.network.native)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """A forward of the layer for every depth."""
        depth = min(self.depth, max_nodes - 1)
        if depth < 1:
            return planted(rows.anchors, [NOTHING] * len(rows))

        num_nodes = depth + 1 if self.tree_nodes is None else self.tree_nodes
        budget = min(num_nodes, max_nodes) - 1
        grown = []
        for slot, anchor in zip(rows.slots, rows.anchors, strict=True):
            self.network.tell(self.cache.lengths[slot] + depth)
            grown.append(self._grow(slot, anchor, depth, budget))
        return planted(rows.anchors, grown)

    def resume(self, source: int, slot: int, count: int) -> int:
        """The pair of a text's last token waits for the next one: here it is known."""
        held = self.cache.resume(slot, source, count)
        self._states.pop(slot, None)
        return held

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            if slot < self.cache.rows:  # others were never observed
                self.cache.free(slot)
                self._states.pop(slot, None)

    def _grow(self, slot: int, anchor: int, depth: int, budget: int) -> Nodes:
        """The likeliest tree of `budget` nodes among all that a beam looks at; with a beam of one,
        a chain."""
        network = self.network
        start = self.cache.lengths[slot]
        width = 1 if self.tree_nodes is None else _BEAM
        beam = _Beam(
            numbers=[-1],
            tokens=torch.tensor([anchor], **INTS),
            joint=torch.zeros(1, 1, **FLOATS),
            states=self._states[slot],
            seen=torch.zeros(1, 0, **BOOLS),
        )
        found: list[_Found] = []
        keys: Tensor | None = None  # of all beams so far [kv_heads, n, head_dim]
        values: Tensor | None = None
        for level in range(depth):
            num_paths = len(beam.tokens)
            positions = torch.full_like(beam.tokens, start + level)
            q, k, v = network.project(beam.tokens, beam.states, positions)
            keys = _behind(keys, k)
            values = _behind(values, v)
            seen = torch.cat((beam.seen, torch.eye(num_paths, **BOOLS)), 1)
            attended = self._attend(slot, q, (keys, values), seen)
            outputs = network.finish(beam.states.expand(num_paths, -1), attended)

            likely = network.likely(outputs, width)
            tokens = likely.tokens.cpu()
            scores = likely.scores.cpu()
            joint = beam.joint + scores  # [paths, n]
            first = len(found)
            found += _looked_at(first, beam.numbers, joint, Likely(tokens, scores))

            best = top(joint.flatten(), width)
            path = best.indices // joint.shape[1]
            beam = _Beam(
                numbers=(first + best.indices).tolist(),
                tokens=tokens.flatten()[best.indices],
                joint=best.values[:, None],
                states=network.fed_back(outputs)[path],
                seen=seen[path],
            )
        return _kept(found, budget)

    def _attend(self, slot: int, q: Tensor, own: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """q [n, heads, head_dim] over the row's pairs and, of the beams' own keys and values
        [kv_heads, m, head_dim], those that `seen` [n, m] shows."""
        own_keys, own_values = own
        past_keys, past_values = self.cache.layer(0, own_keys)
        length = self.cache.lengths[slot]
        keys = torch.cat((past_keys[slot, :, :length], own_keys), 1)
        values = torch.cat((past_values[slot, :, :length], own_values), 1)
        past_seen = torch.ones(len(q), length, **BOOLS)
        mask = torch.cat((past_seen, seen), 1).to(q.device)
        queries = q.transpose(0, 1)
        out = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)


def _behind(earlier: Tensor | None, new: Tensor) -> Tensor:
    """[kv_heads, n, head_dim] and [m, kv_heads, head_dim] -> [kv_heads, n + m, head_dim]"""
    turned = new.transpose(0, 1)
    return turned if earlier is None else torch.cat((earlier, turned), 1)


def _looked_at(first: int, parents: list[int], joint: Tensor, likely: Likely) -> list[_Found]:
    """The nodes behind a beam's paths, numbered from `first` on.

    joint, likely: [paths, n], of the paths that end with `parents`.
    """
    num_each = joint.shape[1]
    costs = (-joint).flatten().tolist()
    tokens = likely.tokens.flatten().tolist()
    scores = likely.scores.flatten().tolist()
    found = []
    for place, cost in enumerate(costs):
        parent = parents[place // num_each]
        found.append(_Found(cost, first + place, parent, tokens[place], scores[place]))
    return found


def _kept(found: Sequence[_Found], budget: int) -> Nodes:
    """The likeliest nodes. No parent is less likely than its child, and its number is lower: it is
    kept and stands before it."""
    best = sorted(found)[:budget]
    places = {-1: 0}
    for place, node in enumerate(best, 1):
        places[node.number] = place

    kept = Nodes([], [], [])
    for node in best:
        kept.tokens.append(node.token)
        kept.parents.append(places[node.parent])
        kept.scores.append(node.score)
    return kept
