"""EAGLE-3 (2503.01840): one decoder layer that drafts token by token from the target's fused
features and its own last state.

The layer reads pairs: the embedding of token t + 1 beside g_t, where g_t = fc(three of the target's
states) for what the target has read, and the layer's own output for what was drafted (section 3.1).
q, k and v are made of both, each under its own norm; the residual is g. Its output, normed, goes to
an lm_head over a reduced vocabulary; un-normed, it is the next g. A dynamic tree (EAGLE-2,
2406.16858) expands the likeliest paths at every depth and keeps the likeliest nodes of all.

What published drafters do otherwise is told by switches of the config (formats/eagle3.py): norms
before fc or of q and k, biases, plain layers behind the first one, a width of their own.
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
from flashdraft.models.layers import CosSin, RMSNorm, apply_rotary
from flashdraft.models.modules import MLP
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Eagle3DraftModel", "Eagle3Drafter", "fused_layers"]

# Layer; q, k, v [n, heads, head_dim] -> [n, heads * head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]

# Model types of DeepSeek's kin, whose EAGLE-3 drafters name layers in a way of their own.
_DEEPSEEK = ("deepseek", "kimi_k", "glm_moe_dsa")
_BEAM = 8  # paths that a tree expands at every depth, and tokens looked at behind each


# --- Which layers it reads


def fused_layers(num_target_layers: int) -> tuple[int, ...]:
    """The layers whose outputs are the inputs of blocks 2, L // 2 and L - 3, as published folders
    mean without saying so."""
    layers = {1, num_target_layers // 2 - 1, max(num_target_layers - 4, 0)}
    return tuple(sorted(layers))


def _outputs(config: DraftConfig, target: Target) -> tuple[int, ...]:
    """The layers whose outputs a folder means that says nothing of its target's depth.

    Ids of eagle_config are outputs, with the exceptions of those who write them (SGLang): an id as
    high as the target is deep is no output of a layer's, so those are ids of hidden_states, one
    higher (NVIDIA's folders); so are those of DeepSeek's kin, unless the first is 1.
    """
    layers = config.target_layer_ids
    if not config.fused:
        return (target.num_layers,)  # the final normed state
    if not layers:
        return fused_layers(target.num_layers)
    if not config.ids_by_target:
        return layers

    is_deepseek = str(target.config.model_type).startswith(_DEEPSEEK)
    are_states = max(layers) == target.num_layers or (is_deepseek and layers[0] != 1)
    if are_states:
        return tuple(layer - 1 for layer in layers)
    return layers


def _check_layers(config: DraftConfig, count: int, target: Target) -> None:
    """Raises DraftMismatch where the target has not the layers whose outputs the drafter reads,
    `count` of them."""
    layers = config.target_layer_ids
    last = target.num_layers - 1 if config.fused else target.num_layers
    if len(layers) == count and min(layers) >= 0 and max(layers) <= last:
        return

    got = (
        f"the draft reads the outputs of {count} layers, "
        f"which `{target.name}` with its {target.num_layers} layers has not"
    )
    hint = "it was trained for another target, or name the layers: eagle_aux_hidden_state_layer_ids"
    raise DraftMismatch(got, hint=hint)


# --- The network


class _Attention(nn.Module):
    """Projections of `inputs` numbers: embedding and state side by side, or a state alone."""

    def __init__(self, config: DraftConfig, inputs: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        bias = config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, queries, bias=bias, **FLOATS)
        self.k_proj = nn.Linear(inputs, keys, bias=bias, **FLOATS)
        self.v_proj = nn.Linear(inputs, keys, bias=bias, **FLOATS)
        self.o_proj = nn.Linear(queries, hidden, bias=bias, **FLOATS)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)


class _PlainLayer(nn.Module):
    """A decoder layer as the target has them, behind the first one."""

    def __init__(self, config: DraftConfig, inputs: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        self.self_attn = _Attention(config, inputs)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)  # of the embedding, in the first layer
        self.post_attention_layernorm = RMSNorm(hidden, eps)


class _Layer(_PlainLayer):
    """The first layer, which reads pairs."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config, 2 * config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # of the state


class Eagle3DraftModel(DraftNetwork):
    """The draft network, under the tensor names of SafeAILab's and SpecForge's folders.

    Plain layers behind the first one (speculators) are read and run, but not trained: `project` and
    `finish` are the first layer's.
    """

    method = "eagle3"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        eps = config.rms_norm_eps
        num_features = config.num_features
        width = config.feature_size
        self.add_rotary()
        self.midlayer = _Layer(config)
        self.layers = nn.ModuleDict()
        for index in range(1, config.num_hidden_layers):
            self.layers[str(index)] = _PlainLayer(config, hidden)

        if config.fused:
            self.fc = nn.Linear(num_features * width, hidden, bias=False, **FLOATS)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(num_features * width, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(width, eps) for _ in range(num_features))
        self.norm = RMSNorm(hidden, eps)

    def fuse(self, features: Tensor) -> Tensor:
        """g [n, hidden] of the target's features [n, features * feature_size]."""
        config = self.config
        if config.norm_before_fc:
            features = self.input_norm(features)
        if config.fc_norm:
            parts = features.chunk(config.num_features, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            features = torch.cat(normed, dim=-1)
        return self.fc(features) if config.fused else features

    def project(
        self, embedded: Tensor, states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [n, heads, head_dim] of pairs: embeddings and states [n, hidden] at positions
        [n]."""
        layer = self.midlayer
        attention = layer.self_attn
        rotary = self.rotary(positions)
        embedding = layer.input_layernorm(embedded)
        state = layer.hidden_norm(states)
        pairs = torch.cat((embedding, state), dim=-1)
        q = self._heads(attention.q_proj(pairs))
        k = self._heads(attention.k_proj(pairs))
        v = self._heads(attention.v_proj(pairs))
        if self.config.qk_norm:
            q = attention.q_norm(q)
            k = attention.k_norm(k)
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


class _PackedLayer:
    """One layer on packed linears."""

    def __init__(self, layer: _PlainLayer, head: DraftHead) -> None:
        block = Block(layer, head.probe)
        config = head.config
        self.eps = config.rms_norm_eps
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.norms = dict(block.norms)
        self.linears = {name: head.packed(*block.fused(name)) for name in block.parts}
        self.nbytes = sum(linear.nbytes for linear in self.linears.values())

    def normed(self, x: Tensor, name: str) -> Tensor:
        weight = self.norms[name]
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def project(self, inputs: Tensor, angles: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [n, heads, head_dim] of normed inputs; q and k rotated."""
        num_kv_heads = self.heads[1]
        qkv = self.linears["qkv"](inputs).view(len(inputs), -1, self.head_dim)
        qk, v = qkv.split((sum(self.heads), num_kv_heads), dim=1)
        if "q_norm" in self.norms:
            q, k = qk.split(self.heads, dim=1)
            qk = torch.cat((self.normed(q, "q_norm"), self.normed(k, "k_norm")), dim=1)
        q, k = apply_rotary(qk, *angles).split(self.heads, dim=1)
        return q, k, v

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, un-normed."""
        x = residual + self.linears["out"](attended)
        normed = self.normed(x, "post_norm")
        gate, up = self.linears["gate_up"](normed).chunk(2, dim=-1)
        return x + self.linears["down"](F.silu(gate) * up)


class _Packed(DraftHead):
    """The same network on packed linears, beside one target; shared by all drafters made from
    it."""

    def __init__(self, model: Eagle3DraftModel, target: Target) -> None:
        super().__init__(model, target)
        self.config = replace(
            model.config,
            num_target_layers=target.num_layers,
            target_layer_ids=_outputs(model.config, target),
        )
        _check_layers(self.config, model.config.num_features, target)

        (self.rotary,) = model.rotaries(self.probe).values()
        first = _PackedLayer(model.midlayer, self)
        self.layers = [first]
        for layer in model.layers.values():
            assert isinstance(layer, _PlainLayer)
            self.layers.append(_PackedLayer(layer, self))
        self.fc = self.packed(model.fc.weight) if self.config.fused else None

        first.norms["states"] = self._taken(model.midlayer.hidden_norm.weight)
        self.norm = self._taken(model.norm.weight)
        self.norm_of_all: Tensor | None = None
        if self.config.norm_before_fc:
            self.norm_of_all = self._taken(model.input_norm.weight)
        self.norm_of_each: list[Tensor] = []
        for norm in model.fc_norm if self.config.fc_norm else ():
            assert isinstance(norm, RMSNorm)
            self.norm_of_each.append(self._taken(norm.weight))

        self.nbytes += sum(layer.nbytes for layer in self.layers)
        if self.fc is not None:
            self.nbytes += self.fc.nbytes

    def _taken(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.probe)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def fuse(self, features: Tensor) -> Tensor:
        """As Eagle3DraftModel.fuse."""
        if self.norm_of_all is not None:
            features = self.normed(features, self.norm_of_all)
        if self.norm_of_each:
            parts = features.chunk(len(self.norm_of_each), dim=-1)
            normed = map(self.normed, parts, self.norm_of_each)
            features = torch.cat(list(normed), dim=-1)
        return features if self.fc is None else self.fc(features)

    def angles(self, positions: Tensor) -> CosSin:
        self.rotary.reserve(int(positions.max()) + 1)
        return self.rotary.at(positions)

    def pairs(self, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads [n, 2 * hidden], and its residual [n, hidden]."""
        first = self.layers[0]
        embedded = first.normed(self.embed(tokens), "input_norm")
        state = first.normed(states, "states")
        residual = state if self.config.norm_before_residual else states
        return torch.cat((embedded, state), dim=-1), residual

    def run(self, tokens: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The last layer's outputs [n, hidden], un-normed, of pairs [n] and [n, hidden].

        attend: of a layer; where it gives None the run ends, for nobody wants the outputs.
        """
        angles = self.angles(positions)
        inputs, x = self.pairs(tokens, states)
        for index, layer in enumerate(self.layers):
            if index > 0:
                inputs = layer.normed(x, "input_norm")
            q, k, v = layer.project(inputs, angles)
            attended = attend(index, q, k, v)
            if attended is None:
                break
            x = layer.finish(x, attended)
        return x

    def fed_back(self, states: Tensor) -> Tensor:
        """As Eagle3DraftModel.fed_back."""
        return self.normed(states, self.norm) if self.config.norm_output else states

    def likely(self, hidden: Tensor, count: int) -> Likely:
        """Of un-normed states."""
        return super().likely(self.normed(hidden, self.norm), count)


# --- The drafter


class _Found(NamedTuple):
    """A node that was looked at, as nodes are sorted: the likeliest path first."""

    cost: float  # its path's negative log-probability
    number: int  # in the order in which nodes were looked at
    parent: int  # its number; -1: the anchor
    token: int
    score: float  # its own log-probability


class _KeysValues(NamedTuple):
    """Of drafted pairs, [kv_heads, n, head_dim] each."""

    keys: Tensor
    values: Tensor


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
        self.cache = SlotCache(len(network.layers), 1, 256)
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
            states = self.network.fuse(seen)
            waiting = self._states.get(slot, states[:0])
            paired = torch.cat((waiting, states))[:-1]
            if len(paired) > 0:
                self._read(slot, new[len(new) - len(paired) :], paired)
            self._states[slot] = states[-1:]

    def _read(self, slot: int, tokens: Tensor, states: Tensor) -> None:
        """Write pairs [n] and [n, hidden] behind those that the row holds."""
        num_pairs = len(states)
        start = self.cache.lengths[slot]
        positions = torch.arange(start, start + num_pairs, **INTS)
        self.cache.reserve(start + num_pairs)
        last = len(self.network.layers) - 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
            own = _behind(None, k, v)
            attended = None
            if layer < last:
                seen = torch.ones(num_pairs, num_pairs, **BOOLS).tril()
                attended = self._attend(layer, slot, q, own, seen)
            self.cache.write(layer, slot, *own)
            return attended

        self.network.run(tokens, states, positions, attend)
        self.cache.keep(slot, range(num_pairs))

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
        held: list[_KeysValues | None] = [None] * len(network.layers)  # of all beams so far
        for level in range(depth):
            num_paths = len(beam.tokens)
            positions = torch.full_like(beam.tokens, start + level)
            seen = torch.cat((beam.seen, torch.eye(num_paths, **BOOLS)), 1)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
                own = _behind(held[layer], k, v)
                held[layer] = own
                return self._attend(layer, slot, q, own, seen)

            states = beam.states.expand(num_paths, -1)
            outputs = network.run(beam.tokens, states, positions, attend)

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

    def _attend(self, layer: int, slot: int, q: Tensor, own: _KeysValues, seen: Tensor) -> Tensor:
        """q [n, heads, head_dim] over the row's pairs and those of `own` that `seen` [n, m] shows:
        [n, heads * head_dim]."""
        own_keys, own_values = own
        past_keys, past_values = self.cache.layer(layer, own_keys)
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


def _behind(earlier: _KeysValues | None, k: Tensor, v: Tensor) -> _KeysValues:
    """New keys and values [n, kv_heads, head_dim] behind those of earlier pairs."""
    keys = k.transpose(0, 1)
    values = v.transpose(0, 1)
    if earlier is None:
        return _KeysValues(keys, values)
    earlier_keys, earlier_values = earlier
    all_keys = torch.cat((earlier_keys, keys), 1)
    all_values = torch.cat((earlier_values, values), 1)
    return _KeysValues(all_keys, all_values)


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
