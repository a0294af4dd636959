"""DFlash (2602.06036, section 4): a small block-diffusion network fills a whole block of masked
tokens in one forward pass.

A block has B = `block_size` tokens. It begins with the anchor, the last committed token, whose
position is a:

    position   0 ... a - 1 |    a      a + 1   a + 2   ...   a + B - 1
    input       context C  | anchor     MASK    MASK   ...      MASK
    output                 |    -     x[a+1]  x[a+2]   ...    x[a+B-1]

Output row k predicts the token AT position a + k: a row guesses its own place, not the next one.
The anchor's row guesses nothing. Every row sees the whole context and the whole block, in both
directions. The context ends strictly before the anchor, which the target has not read yet.
Of anchor-first blocks (DeepSpec's) row k predicts the token at a + k + 1, the anchor's row x[a+1]:
B - 1 rows are enough for the same B - 1 drafts.

The context is what the target thought of the text: the outputs of a few of its layers (features),
fused once, C = RMSNorm(fc(features)). C bypasses everything but the key and value projections of
every layer ("KV injection"), so that the context costs the draft two small matrices per token and
layer, once; the results wait in a cache of its own. Embedding and lm_head are the target's.

In this file: the network as it is trained (`DFlashDraftModel`), its weights packed for decoding
beside one target (`PackedDraft`), and the drafter that holds a text's context (`DFlashDrafter`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Laws, best_first, independent, planted
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DRAFT_KERNEL, DraftHead, DraftNetwork, Likely
from flashdraft.methods.sequential import (
    BRANCHES,
    Confidence,
    Domino,
    Selector,
    SequentialHead,
    Swiglu,
    markov_of,
)
from flashdraft.models.blocks import Block
from flashdraft.models.cache import SlotCache
from flashdraft.models.compiled import CompiledStep
from flashdraft.models.convolution import BlockConvolution, Kernels, convolved
from flashdraft.models.decoder import Decoder, Layout
from flashdraft.models.heads import (
    CandidateSelector,
    ConfidenceHead,
    GatedMarkovHead,
    MarkovHead,
    RecurrentMarkovHead,
    SwigluHead,
    domino_projection,
)
from flashdraft.models.layers import (
    Linear,
    RMSNorm,
    Rotary,
    apply_rotary,
    pack,
)
from flashdraft.models.modules import MLP, Attention
from flashdraft.models.target import Target
from flashdraft.process import BOOLS, FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["DFlashDraftModel", "DFlashDrafter"]

EMBEDDING = -1  # the layer id of the target's embeddings

CosSin = tuple[Tensor, Tensor]  # what `apply_rotary` takes
KeysValues = tuple[Tensor, Tensor]  # [n, kv_heads, head_dim] each
Attend = Callable[[int, Tensor, KeysValues, KeysValues], Tensor]


# --- The network


class _Layer(nn.Module):
    """A Qwen3 block's modules, called one by one, since the context joins in between."""

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
        self.attention_conv = _convolution(config)
        self.mlp_conv = _convolution(config)

    def queries(self, x: Tensor, rotary: CosSin) -> Tensor:
        """[n, hidden] -> [n, heads, head_dim]"""
        queries = self._heads(self.self_attn.q_proj(x))
        return apply_rotary(self.self_attn.q_norm(queries), *rotary)

    def keys_values(self, x: Tensor, rotary: CosSin) -> KeysValues:
        """[n, hidden] -> keys and values; the same weights serve the context and the block."""
        keys = self._heads(self.self_attn.k_proj(x))
        values = self._heads(self.self_attn.v_proj(x))
        return apply_rotary(self.self_attn.k_norm(keys), *rotary), values

    def _heads(self, projected: Tensor) -> Tensor:
        """[n, heads * head_dim] -> [n, heads, head_dim]"""
        return projected.view(len(projected), -1, self.self_attn.head_dim)


def _convolution(config: DraftConfig) -> BlockConvolution | None:
    """DFlash 2's, around one sublayer."""
    if not config.conv_kernel_size:
        return None
    return BlockConvolution(config.hidden_size, config.conv_kernel_size, config.conv_group_size)


def _kernels(convolution: nn.Module | None, normed: Tensor) -> Kernels:
    if convolution is None:
        return None, None
    kernels: Kernels = convolution(normed)
    return kernels


class DFlashDraftModel(DraftNetwork):
    """The draft network. Its modules carry z-lab's tensor names; `from_pretrained` and
    `save_pretrained` use their format."""

    method = "dflash"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        num_features = len(config.target_layer_ids)
        self.fc = nn.Linear(num_features * hidden, hidden, bias=False, **FLOATS)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.add_rotary()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)

        self.candidate_selector: CandidateSelector | None = None
        self.markov_head: MarkovHead | None = None
        self.prefix_gru: nn.GRU | None = None
        self.embed_proj: nn.Sequential | None = None
        self.confidence_head: ConfidenceHead | None = None
        if config.sequential_head is not None:
            self.add_head(config.sequential_head, config.head_rank)
        if config.confidence_head:
            rank = config.head_rank if config.confidence_with_markov else 0
            self.confidence_head = ConfidenceHead(hidden, rank)

    def add_head(self, kind: str, rank: int) -> None:
        """A sequential head that changes nothing yet; kind: of HEADS (models/heads.py)."""
        config = replace(self.config, sequential_head=kind, head_rank=rank)
        self.config = config
        hidden = config.hidden_size
        vocab_size = config.vocab_size
        draft_size = config.draft_vocab_size or vocab_size
        match kind:
            case "swiglu":
                self.sequential_head = SwigluHead(hidden, rank)
            case "selector":
                self.candidate_selector = CandidateSelector(hidden, rank, vocab_size)
            case "markov":
                self.markov_head = MarkovHead(rank, vocab_size, draft_size)
            case "markov_gated":
                self.markov_head = GatedMarkovHead(hidden, rank, vocab_size, draft_size)
            case "markov_rnn":
                self.markov_head = RecurrentMarkovHead(hidden, rank, vocab_size, draft_size)
            case "domino":
                states = config.head_states
                self.prefix_gru = nn.GRU(hidden, states, bias=False, batch_first=True, **FLOATS)
                self.embed_proj = domino_projection(hidden, states, rank, vocab_size)
            case _:
                raise AssertionError(f"no head {kind!r}")

    def context(self, features: Tensor) -> Tensor:
        """features [n, F * hidden] -> C [n, hidden], from which every layer makes its context keys
        and values."""
        return self.hidden_norm(self.fc(features))  # type: ignore[no-any-return]

    def forward(
        self, context: Tensor, block: Tensor, positions: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """The whole network on packed rows.

        context: C [n, hidden]; block: embeddings [m, hidden], block by block, `block_rows` each;
        positions: absolute ones of both, [n] and [m]; attend(layer, q, context_kv, block_kv) -> [m,
        heads * head_dim], where q is [m, heads, head_dim] and each kv is a pair of [., kv_heads,
        head_dim].
        Returns the normed states [m, hidden], for the target's lm_head.
        """
        rotaries = self._rotaries_by_layer(positions)
        places = torch.arange(len(block), **INTS).to(block.device) % self.config.block_rows
        x = block
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            context_rotary, block_rotary = rotaries[index]
            normed = layer.input_layernorm(x)
            before, behind = _kernels(layer.attention_conv, normed)
            inputs = convolved(normed, before, places)
            context_kv = layer.keys_values(context, context_rotary)
            block_kv = layer.keys_values(inputs, block_rotary)
            queries = layer.queries(inputs, block_rotary)
            attended = attend(index, queries, context_kv, block_kv)
            x = x + convolved(layer.self_attn.o_proj(attended), behind, places)

            normed = layer.post_attention_layernorm(x)
            before, behind = _kernels(layer.mlp_conv, normed)
            inputs = convolved(normed, before, places)
            x = x + convolved(layer.mlp(inputs), behind, places)
        return self.norm(x)  # type: ignore[no-any-return]

    def _rotaries_by_layer(self, positions: tuple[Tensor, Tensor]) -> list[tuple[CosSin, CosSin]]:
        """Of every layer: the rotations of the context and of the block."""
        context, block = positions
        by_kind = {}
        for kind in self.frequencies:
            by_kind[kind] = (self.rotary(context, kind), self.rotary(block, kind))

        if len(by_kind) == 1:  # whatever kinds of layers there are
            return list(by_kind.values()) * len(self.layers)
        return [by_kind[kind] for kind in self.config.layer_types]

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        return functools.partial(DFlashDrafter, PackedDraft(self, target))


# --- The network beside a target


class PackedDraft(DraftHead):
    """A draft network's weights, packed for decoding beside one target; shared by all drafters made
    from it."""

    def __init__(self, model: DFlashDraftModel, target: Target) -> None:
        super().__init__(model, target)
        config = model.config
        rotaries = model.rotaries(self.probe)
        blocks = self._blocks(model, rotaries)
        self.fc = self.packed(model.fc.weight)
        self.hidden_norm = model.hidden_norm.weight.detach().to(self.probe)
        self.context_kv = self._context_linear(blocks)
        self.k_norm = torch.stack([block.norms["k_norm"] for block in blocks])

        norm = model.norm.weight.detach().to(self.probe)
        rotary = next(iter(rotaries.values()))
        kernel = "compiled" if target.kernel_name == "compiled" else DRAFT_KERNEL
        eps = config.rms_norm_eps
        self.decoder = Decoder(blocks, norm, rotary=rotary, eps=eps, kernel=kernel)

        self.step: CompiledStep | None = None
        if self.decoder.kernel == "compiled":
            weights = [self.embedding, self.mask_row]  # the target pins its own
            length = target.context_length + config.block_rows
            self.step = CompiledStep(
                self.decoder, self.embed, nn.Identity(), weights, num_positions=length
            )

        self.sequential = self._sequential(model)
        self.confidence: Confidence | None = None  # None: laws alone tell what is likely
        if model.confidence_head is not None:
            self.confidence = Confidence(self, model.confidence_head, self.sequential)

        for part in (self.decoder, self.fc, self.context_kv):
            self.nbytes += part.nbytes
        if self.sequential is not None:
            self.nbytes += self.sequential.nbytes

    def _sequential(self, model: DFlashDraftModel) -> SequentialHead | None:
        """The head that the model has, if any."""
        if model.sequential_head is not None:
            return Swiglu(self, model.sequential_head)
        if model.candidate_selector is not None:
            return Selector(self, model.candidate_selector)
        if model.markov_head is not None:
            return markov_of(self, model.markov_head)
        if model.prefix_gru is not None:
            assert model.embed_proj is not None
            return Domino(self, model.prefix_gru, model.embed_proj)
        return None

    def _blocks(self, model: DFlashDraftModel, rotaries: dict[str, Rotary]) -> list[Block]:
        config = model.config
        rotary = next(iter(rotaries.values()))
        blocks = []
        for index, mask in enumerate(config.masks):
            if len(rotaries) > 1:
                rotary = rotaries[config.layer_types[index]]
            layer = model.layers[index]
            window, causal = mask
            block = Block(layer, self.probe, window=window, causal=causal, rotary=rotary)
            blocks.append(block)
        return blocks

    def _context_linear(self, blocks: Sequence[Block]) -> Linear:
        """C -> keys and values of all layers, in one linear.

        In a block's own fused weight they stand behind the queries.
        """
        num_queries = self.config.num_attention_heads * self.config.head_dim
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for block in blocks:
            weight, bias = block.fused("qkv")
            weights.append(weight[num_queries:])
            if bias is not None:
                biases.append(bias[num_queries:])
        bias = torch.cat(biases) if biases else None
        return pack(torch.cat(weights), bias, kernel=DRAFT_KERNEL)

    def context(self, features: Tensor, positions: Tensor) -> KeysValues:
        """Keys and values of every layer for features [n, F * hidden] at positions [n]:
        [n, layers, kv_heads, head_dim] each."""
        decoder = self.decoder
        eps = self.config.rms_norm_eps
        num_layers, head_dim = self.k_norm.shape
        decoder.reserve(int(positions.max()) + 1)
        tables = [rotary.at(positions) for rotary in decoder.rotaries]
        cos = torch.stack([cos for cos, _ in tables], dim=1)  # [n, tables, 1, head_dim]
        sin = torch.stack([sin for _, sin in tables], dim=1)
        if len(tables) > 1:  # one a layer
            cos = cos[:, decoder.which]
            sin = sin[:, decoder.which]

        fused = self.fc(features)
        context = F.rms_norm(fused, self.hidden_norm.shape, self.hidden_norm, eps)
        kv = self.context_kv(context).view(len(context), num_layers, 2, -1, head_dim)
        keys = kv[:, :, 0]
        values = kv[:, :, 1]
        normed = F.rms_norm(keys, (head_dim,), None, eps) * self.k_norm[:, None]
        return apply_rotary(normed, cos, sin), values

    def scored(self, hidden: Tensor, anchors: Tensor) -> Likely:
        """Chains: the likeliest token of every position that predicts, [rows, n, 1].

        hidden: the positions' states [rows, n, hidden]; anchors: [rows]. With a sequential head
        from left to right, each position seeing the likeliest token before it.
        """
        if self.sequential is None:
            tokens, scores = self.likely(hidden, 1)
        else:
            tokens, scores = self.sequential.chain(hidden, anchors)

        if self.confidence is not None:
            chosen = tokens[:, :-1, 0]
            before = torch.cat((anchors[:, None].to(chosen.device), chosen), dim=1)
            scores = self.confidence.reweighed(scores, hidden, before)
        return Likely(tokens, scores)

    def laws(self, hidden: Tensor, anchors: Tensor, *, trees: bool) -> list[list[Laws]]:
        """By row, the laws of every depth, for `best_first`: of chains the likeliest tokens alone.

        Of trees with a sequential head, those behind the tokens of the likeliest paths.
        """
        if trees and self.sequential is not None:
            return self._laws_behind_paths(self.sequential, hidden, anchors)

        likely = self._independent(hidden) if trees else self.scored(hidden, anchors)
        tokens, scores = likely
        rows = zip(anchors.tolist(), tokens.tolist(), scores.tolist(), strict=True)
        return [independent(*row) for row in rows]

    def _independent(self, hidden: Tensor) -> Likely:
        """The likeliest tokens of positions that do not see each other."""
        tokens, scores = self.likely(hidden, BRANCHES)
        if self.confidence is not None:
            scores = self.confidence.reweighed(scores, hidden, None)
        return Likely(tokens, scores)

    def _laws_behind_paths(
        self, head: SequentialHead, hidden: Tensor, anchors: Tensor
    ) -> list[list[Laws]]:
        depths = list(head.depths(hidden, anchors, head.num_paths))  # all, before one is read
        if self.confidence is not None:
            for k, depth in enumerate(depths):
                own = hidden[:, k, None].expand(-1, depth.before.shape[1], -1)
                scores = self.confidence.reweighed(depth.scores, own, depth.before)
                depths[k] = depth._replace(scores=scores)

        laws: list[list[Laws]] = [[] for _ in range(len(anchors))]
        for depth in depths:
            before = depth.before.tolist()
            tokens = depth.tokens.tolist()
            log_law = depth.scores.tolist()
            for row, of_row in enumerate(laws):
                behind = zip(tokens[row], log_law[row], strict=True)
                of_row.append(dict(zip(before[row], behind, strict=True)))
        return laws


# --- The drafter


class DFlashDrafter(Drafter):
    """Drafts a chain per row, the likeliest token of every masked position, or a tree of them; all
    are chosen, not drawn.

    tree_nodes: the anchor's tree has that many nodes, best first over the positions' laws
    (DDTree, 2604.12989).
    """

    name = "dflash"

    def __init__(
        self, network: PackedDraft, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        config = network.config
        self.network = network
        self.tree_nodes = tree_nodes
        self.block_size = config.block_size if block_size is None else block_size
        shape = replace(config, block_size=self.block_size)
        self.block_rows = shape.block_rows
        self.first_row = shape.first_row  # that predicts
        self.layers = tuple(layer for layer in config.target_layer_ids if layer != EMBEDDING)
        self.cache = SlotCache(config.num_hidden_layers, 1, 256, blocked=network.decoder.native)
        self.caches: tuple[SlotCache, ...] = (self.cache,)

    @undisturbed
    @torch.inference_mode()
    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        """Turn new features into context keys and values, once."""
        features = self._read(tokens, features)
        self.cache.reserve(0, rows=max(rows.slots) + 1)
        counts = [len(own) for own in features]
        if not any(counts):
            return

        positions = []
        longest = 0
        for slot, count in zip(rows.slots, counts, strict=True):
            start = self.cache.lengths[slot]
            positions.append(torch.arange(start, start + count, **INTS))
            longest = max(longest, start + count)
        together = torch.cat(list(features))
        keys, values = self.network.context(together, torch.cat(positions))

        self.cache.reserve(longest + 1)  # where rows that are not drafted may write padding
        parts = zip(rows.slots, keys.split(counts), values.split(counts), strict=True)
        for slot, own_keys, own_values in parts:
            for layer in range(self.cache.num_layers):
                layer_keys = own_keys[:, layer].transpose(0, 1)
                layer_values = own_values[:, layer].transpose(0, 1)
                self.cache.write(layer, slot, layer_keys, layer_values)
            self.cache.keep(slot, range(len(own_keys)))

    def _read(
        self, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> Sequence[Tensor]:
        """What the network reads of these tokens: among the layers' outputs their embeddings,
        where it was trained on them."""
        ids = self.network.config.target_layer_ids
        if EMBEDDING not in ids:
            assert features is not None
            return features

        network = self.network
        read = []
        for row, own_tokens in enumerate(tokens):
            embedded = network.target.embed(own_tokens).to(network.probe)
            outputs: Iterator[Tensor] = iter(())
            if features is not None:
                outputs = iter(features[row].to(network.probe).chunk(len(self.layers), dim=-1))
            columns = [embedded if layer == EMBEDDING else next(outputs) for layer in ids]
            read.append(torch.cat(columns, dim=-1))
        return read

    @undisturbed
    @serial(lambda self: self.network.decoder.native)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """One forward of the network over every row's block."""
        anchors = rows.anchors
        width = min(self.block_size, max_nodes)
        if width <= 1:
            return planted(anchors, [NOTHING] * len(rows))

        self.network.tell(max(rows.positions) + self.block_rows)
        ids = torch.tensor(anchors, **INTS)
        end = self.first_row + width - 1
        hidden = self._states(rows.slots, ids)[:, self.first_row : end]
        laws = self.network.laws(hidden, ids, trees=self.tree_nodes is not None)
        num_nodes = self.block_size if self.tree_nodes is None else self.tree_nodes
        count = min(num_nodes, max_nodes) - 1
        grown = []
        for anchor, own in zip(anchors, laws, strict=True):
            grown.append(best_first(anchor, own, count))
        return planted(anchors, grown)

    def _states(self, slots: list[int], anchors: Tensor) -> Tensor:
        """States of the rows' blocks [rows, block rows, hidden]; a block is always fed whole, as in
        training."""
        network = self.network
        num_rows = len(slots)
        size = self.block_rows
        longest = max(self.cache.lengths[slot] for slot in slots)
        self.cache.reserve(longest + size)

        tokens = torch.full((num_rows, size), network.config.mask_token_id, **INTS)
        tokens[:, 0] = anchors
        seen = torch.ones(num_rows, size, size, **BOOLS)  # but for what a layer's own mask hides
        depths = torch.arange(size, **INTS).expand(num_rows, size)
        sizes = torch.full((num_rows,), size, **INTS)
        layout = Layout(seen, depths, sizes)
        if network.step is not None:
            states, _ = network.step(self.cache, slots, tokens, layout, ())
        else:
            embedded = network.embed(tokens)
            states, _ = network.decoder(self.cache, slots, embedded, layout, ())
        return states

    def resume(self, source: int, slot: int, count: int) -> int:
        return self.cache.resume(slot, source, count)

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            if slot < self.cache.rows:  # others were never observed
                self.cache.free(slot)
