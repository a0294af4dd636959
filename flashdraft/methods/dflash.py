"""DFlash (2602.06036): a small block-diffusion network fills a whole block of masked tokens in one forward pass.

The network reads the target's hidden states (features). Fused once, C = RMSNorm(fc(features)), they bypass everything
but the key and value projections of every layer ("KV injection"), so the context costs the draft two small matrices per
token, cached in its own slots. The block is [anchor, MASK x (B - 1)]; each of its rows sees the whole context, which
ends strictly before the anchor, and the whole block. Output row k predicts the token AT position anchor + k.
Embedding and lm_head are the target's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Laws, best_first, independent, planted
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DRAFT_KERNEL, DraftHead, DraftNetwork
from flashdraft.models import native
from flashdraft.models.blocks import Block
from flashdraft.models.cache import SlotCache
from flashdraft.models.compiled import CompiledStep
from flashdraft.models.decoder import Decoder, Layout
from flashdraft.models.layers import RMSNorm, SwigluHead, apply_rotary, pack, swiglu
from flashdraft.models.modules import MLP, Attention
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["DFlashDraftModel", "DFlashDrafter"]

_BRANCHES = 8  # tokens of a position that a tree may hold
_LIKELY = 64  # tokens among which a corrected state chooses
_PATHS = 3  # of a depth whose tokens a tree goes on from, where each token sees the one before it


class _Layer(nn.Module):
    """A Qwen3 block's modules; they are called one by one, since the context joins in between."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            eps=config.rms_norm_eps,
            bias=config.attention_bias,
        )
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[n, hidden] -> [n, heads, head_dim]"""
        own = self.self_attn
        return apply_rotary(own.q_norm(own.q_proj(x).view(len(x), -1, own.head_dim)), *rotary)

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[n, hidden] -> [n, kv_heads, head_dim] each; the same weights serve the context and the block."""
        own = self.self_attn
        keys, values = (
            linear(x).view(len(x), -1, own.head_dim) for linear in (own.k_proj, own.v_proj)
        )
        return apply_rotary(own.k_norm(keys), *rotary), values


class DFlashDraftModel(DraftNetwork):
    """The draft network. Its modules carry z-lab's tensor names; `from_pretrained` and `save_pretrained` use their format."""

    method = "dflash"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(
            len(config.target_layer_ids) * config.hidden_size,
            config.hidden_size,
            bias=False,
            **FLOATS,
        )
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.add_rotary()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.sequential_head is not None:
            self.add_head(config.sequential_head, config.head_rank)

    def add_head(self, kind: str, rank: int) -> None:
        """A sequential head that changes nothing yet."""
        self.config = replace(self.config, sequential_head=kind, head_rank=rank)
        self.sequential_head = SwigluHead(self.config.hidden_size, rank)

    def context(self, features: Tensor) -> Tensor:
        """features [n, F * hidden] -> C [n, hidden], from which every layer makes its context keys and values."""
        return self.hidden_norm(self.fc(features))  # type: ignore[no-any-return]

    def forward(
        self, context: Tensor, block: Tensor, positions: tuple[Tensor, Tensor], attend: Any
    ) -> Tensor:
        """The whole network on packed rows.

        context: C [n, hidden]; block: embeddings [m, hidden]; positions: absolute ones of both, [n] and [m];
        attend(layer, q, context_kv, block_kv) -> [m, heads * head_dim], where q is [m, heads, head_dim] and each kv is a
        pair of [., kv_heads, head_dim]. Returns the normed states [m, hidden], for the target's lm_head.
        """
        rotaries = [[self.rotary(at) for at in positions]]
        if len(self.frequencies) > 1:
            by_kind = {
                kind: [self.rotary(at, kind) for at in positions] for kind in self.frequencies
            }
            rotaries = [by_kind[kind] for kind in self.config.layer_types]
        x = block
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            context_rotary, block_rotary = rotaries[index % len(rotaries)]
            normed = layer.input_layernorm(x)
            context_kv, block_kv = (
                layer.keys_values(context, context_rotary),
                layer.keys_values(normed, block_rotary),
            )
            out = attend(index, layer.queries(normed, block_rotary), context_kv, block_kv)
            x = x + layer.self_attn.o_proj(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x)  # type: ignore[no-any-return]

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        return functools.partial(DFlashDrafter, PackedDraft(self, target))


class PackedDraft(DraftHead):
    """A draft network's weights, packed for decoding beside one target; shared by all drafters made from it."""

    def __init__(self, model: DFlashDraftModel, target: Target) -> None:
        super().__init__(model, target)
        probe, config = self.probe, model.config
        self.fc = self.packed(model.fc.weight)
        rotaries = model.rotaries(probe)
        first_rotary = next(iter(rotaries.values()))
        kinds = config.layer_types if len(rotaries) > 1 else (None,) * len(model.layers)
        blocks = []
        for layer, kind, (window, causal) in zip(model.layers, kinds, config.masks, strict=True):
            own = first_rotary if kind is None else rotaries[kind]
            blocks.append(Block(layer, probe, window=window, causal=causal, rotary=own))
        norm = model.norm.weight.detach().to(probe)
        kernel = "compiled" if target.kernel_name == "compiled" else DRAFT_KERNEL
        self.decoder = Decoder(
            blocks, norm, rotary=first_rotary, eps=config.rms_norm_eps, kernel=kernel
        )
        first = (
            config.num_attention_heads * config.head_dim
        )  # behind the queries: keys and values, of all layers in one linear
        weights, biases = zip(*(block.fused("qkv") for block in blocks), strict=True)
        bias = None if biases[0] is None else torch.cat([b[first:] for b in biases])
        self.context_kv = pack(
            torch.cat([weight[first:] for weight in weights]), bias, kernel=DRAFT_KERNEL
        )
        self.k_norm = torch.stack([block.norms["k_norm"] for block in blocks])
        self.hidden_norm = model.hidden_norm.weight.detach().to(probe)
        compiled = self.decoder.kernel == "compiled"  # the target pins its own embedding
        self.step: CompiledStep | None = None
        if compiled:
            length = target.context_length + config.block_size
            self.step = CompiledStep(
                self.decoder, self.embed, nn.Identity(), [self.embedding], num_positions=length
            )
        head = (
            []
            if model.sequential_head is None
            else [part.detach().to(probe) for part in model.sequential_head.parameters()]
        )
        self.sequential = [self.packed(weight) for weight in head]
        self.tables: tuple[
            Tensor, ...
        ] = ()  # what the C++ kernel of the sequential head reads: of every draft id, and weights
        if head and self.vocabulary is not None and self.plain and native.usable(probe):
            rows, embedded = (
                self.head_rows(torch.arange(len(self.vocabulary), **INTS)),
                self.embed(self.vocabulary),
            )
            self.tables = rows, rows if torch.equal(rows, embedded) else embedded, *head
        parts = (
            self.decoder,
            self.fc,
            self.context_kv,
            *self.sequential,
            *dict.fromkeys(self.tables),
        )
        self.nbytes += sum(part.nbytes for part in parts)

    def context(self, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every layer for features [n, F * hidden]: [n, layers, kv_heads, head_dim] each."""
        config, decoder = self.config, self.decoder
        decoder.reserve(int(positions.max()) + 1)
        tables = [rotary.at(positions) for rotary in decoder.rotaries]
        cos, sin = (
            torch.stack(parts, dim=1) for parts in zip(*tables, strict=True)
        )  # [n, tables, 1, head_dim]
        if len(tables) > 1:
            cos, sin = cos[:, decoder.which], sin[:, decoder.which]
        state = F.rms_norm(
            self.fc(features), self.hidden_norm.shape, self.hidden_norm, config.rms_norm_eps
        )
        kv = self.context_kv(state).view(len(state), len(self.k_norm), 2, -1, config.head_dim)
        keys = (
            F.rms_norm(kv[:, :, 0], (config.head_dim,), None, config.rms_norm_eps)
            * self.k_norm[:, None]
        )
        return apply_rotary(keys, cos, sin), kv[:, :, 1]

    def scored(self, hidden: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Chains: the likeliest tokens behind the anchors [rows], and their scores: hidden [rows, n, hidden] -> [rows, n, 1].

        With a sequential head from left to right, each position seeing the likeliest token before it.
        """
        if not self.sequential:
            return self.likely(hidden, 1)
        if not self.tables:
            _, tokens, scores = zip(*self._beam(hidden, anchors, 1), strict=True)
            return torch.cat(tokens, dim=1), torch.cat(scores, dim=1)
        likely = self._candidates(hidden)
        best = native.chain(hidden, self.embed(anchors), self.tables, likely).max(-1, keepdim=True)
        return self.ids(likely.gather(-1, best.indices)), best.values

    def laws(self, hidden: Tensor, anchors: Tensor, *, trees: bool) -> Sequence[list[Laws]]:
        """By row, the laws of every depth; of trees with a sequential head, those behind the tokens of the likeliest paths."""
        if trees and self.sequential:
            beam = [
                zip(*map(Tensor.tolist, depth), strict=True)
                for depth in list(self._beam(hidden, anchors, _PATHS))
            ]
            return [
                [dict(zip(own[0], zip(*own[1:], strict=True), strict=True)) for own in row]
                for row in zip(*beam, strict=True)
            ]
        found = (
            anchors,
            *(self.likely(hidden, _BRANCHES) if trees else self.scored(hidden, anchors)),
        )
        return [independent(*own) for own in zip(*map(Tensor.tolist, found), strict=True)]

    def _beam(
        self, hidden: Tensor, anchors: Tensor, paths: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """By depth: the likeliest paths' last tokens [rows, m], the likeliest tokens behind each, their scores [rows, m, n]."""
        likely, before, reached = (
            self._candidates(hidden),
            anchors[:, None],
            hidden.new_zeros(1, 1, 1),
        )
        heads = self.head_rows(likely)
        for k in range(hidden.shape[1]):
            states = swiglu(
                hidden[:, k].repeat_interleave(before.shape[1], 0),
                self.embed(before.flatten()),
                *self.sequential,
            )
            logits = self.transformed(states.view(*before.shape, -1) @ heads[:, k].mT)
            laws, ids = logits.log_softmax(-1), self.ids(likely[:, k])
            best = laws.topk(min(_BRANCHES if paths > 1 else 1, laws.shape[-1]), dim=-1)
            yield before, ids[:, None].expand_as(laws).gather(-1, best.indices), best.values
            ways = (reached + laws).amax(1).topk(min(paths, laws.shape[-1]), dim=-1)
            before, reached = ids.gather(-1, ways.indices), ways.values[..., None]

    def _candidates(self, hidden: Tensor) -> Tensor:
        """Draft ids [..., n] that the sequential head is asked about: to ask it about all would cost a second lm_head."""
        logits = self.logits(hidden)
        return logits.topk(min(_LIKELY, logits.shape[-1]), dim=-1).indices


class DFlashDrafter:
    """Drafts a chain per row, the likeliest token of every masked position, or a tree of them; all are chosen, not drawn.

    tree_nodes: the anchor's tree has that many nodes, best first over the positions' laws (DDTree, 2604.12989).
    """

    name = "dflash"

    def __init__(
        self, network: PackedDraft, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        config = network.config
        self.network, self.tree_nodes = network, tree_nodes
        self.block_size = block_size or config.block_size
        self.layers = config.target_layer_ids
        self.cache = SlotCache(config.num_hidden_layers, 1, 256, blocked=network.decoder.native)
        self.caches: tuple[SlotCache, ...] = (self.cache,)

    @undisturbed
    @torch.inference_mode()
    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Turn new features into context keys and values, once."""
        assert features is not None
        net, config = self.network, self.network.config
        self.cache.reserve(0, rows=max(rows.slots) + 1)
        starts = [self.cache.lengths[slot] for slot in rows.slots]
        counts = [len(own) for own in features]
        if not sum(counts):
            return
        positions = torch.cat(
            [
                torch.arange(start, start + n, **INTS)
                for start, n in zip(starts, counts, strict=True)
            ]
        )
        parts = net.context(torch.cat(list(features)), positions)
        self.cache.reserve(max(start + n for start, n in zip(starts, counts, strict=True)))
        for slot, keys, values in zip(
            rows.slots, *(part.split(counts) for part in parts), strict=True
        ):
            for index in range(config.num_hidden_layers):
                self.cache.write(
                    index, slot, keys[:, index].transpose(0, 1), values[:, index].transpose(0, 1)
                )
            self.cache.keep(slot, range(len(keys)))

    @undisturbed
    @serial(lambda self: self.network.decoder.native)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """One forward of the network over every row's block."""
        anchors, size = rows.anchors, self.block_size
        grown = [NOTHING] * len(rows)
        if (width := min(size, max_nodes)) > 1:
            self.network.tell(max(rows.positions) + size)
            own = torch.tensor(anchors, **INTS)
            hidden = self._states(rows.slots, own)[:, 1:width]
            for i, laws in enumerate(
                self.network.laws(hidden, own, trees=self.tree_nodes is not None)
            ):
                grown[i] = best_first(anchors[i], laws, min(self.tree_nodes or size, max_nodes) - 1)
        return planted(anchors, grown)

    def end(self, rows: Rows) -> None:
        for slot in set(rows.slots) & set(range(self.cache.rows)):
            self.cache.free(slot)

    def _states(self, slots: list[int], anchors: Tensor) -> Tensor:
        """Of the rows' blocks [rows, block, hidden]; a block is always fed whole, as in training."""
        net, size, count = self.network, self.block_size, len(slots)
        self.cache.reserve(max(self.cache.lengths[slot] for slot in slots) + size)
        tokens = torch.full((count, size), net.config.mask_token_id, **INTS)
        tokens[:, 0] = anchors
        everything = torch.ones(count, size, size, **BOOLS)  # but for what a layer's own mask hides
        shape = Layout(
            everything,
            torch.arange(size, **INTS).expand(count, size),
            torch.full((count,), size, **INTS),
        )
        run, x = (net.step, tokens) if net.step else (net.decoder, net.embed(tokens))
        return run(self.cache, slots, x, shape, ())[0]
