"""What one step trains on, and every method's training pass over it.

Random anchors in the answers, sequences packed one behind the other and isolated by masks. A block
is an anchor and the positions behind it; a pass gives a state for every block row, which the
lm_head turns into a guess of the row's own token. What stands in a block's first row, the anchor's,
is never looked at. All methods have the same blocks, labels and losses, and FLOPs are counted by
one function, so that they can be compared.
Does not know losses, optimizers or the order of the samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from flashdraft.errors import CheckpointError, DataError
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.process import BOOLS, INTS
from flashdraft.train.features import Sample, Sizes

__all__ = [
    "Batch",
    "FlopCount",
    "Pass",
    "Positions",
    "Span",
    "anchor_bounds",
    "block_mask",
    "block_positions",
    "draw_anchors",
    "flex_mask",
    "make_batch",
    "why_no_anchor",
]

Embed = Callable[[Tensor], Tensor]  # the target's embedding
Numbered = Iterable[
    tuple[int, Sample]
]  # samples with their global numbers, which key their anchors


# Anchors.


def draw_anchors(
    num_prompt: int, num_tokens: int, count: int, generator: torch.Generator
) -> Tensor:
    """At most `count` random positions, sorted, of response tokens with a successor.

    The first one is among them (2602.06036, section 4).
    """
    end = max(num_prompt, num_tokens - 1)  # there are none where the answer was cut off
    candidates = torch.arange(num_prompt, end, **INTS)
    order = torch.randperm(len(candidates), generator=generator, **INTS)
    return candidates[order[:count]].sort().values


def anchor_bounds(sizes: Sizes, config: DraftConfig, min_context: int = 0) -> tuple[int, int]:
    """First and end: anchors lie from the first on; the token before the end is the last label."""
    first = max(sizes.num_prompt, min_context)
    # No block ends beyond the positions that the network is made for.
    room = config.trained_length - config.block_size + 2
    end = min(sizes.num_tokens, room)
    if sizes.num_final is not None:  # a label needs the state before it
        end = min(end, sizes.num_final + 1)
    return first, end


def why_no_anchor(sizes: Sizes, config: DraftConfig, min_context: int = 0) -> str:
    """Why nothing can be learned from a sample; empty where something can."""
    first, end = anchor_bounds(sizes, config, min_context)
    if first + 1 < end:
        return ""

    if sizes.num_prompt + 1 >= sizes.num_tokens:
        num_there = max(0, sizes.num_tokens - sizes.num_prompt)
        return f"{num_there} tokens of its answer are there, two are needed"
    if sizes.num_prompt + 1 >= end:
        behind = f"behind the drafter's {config.trained_length} positions"
        return f"its answer begins at {sizes.num_prompt}, {behind}"
    return f"it ends at {sizes.num_tokens}, too early for min_context {min_context}"


# Positions and masks of blocks.


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """[anchors] -> [anchors * block_size] absolute positions.

    Those past the sequence's end are masked out by the loss.
    """
    return (anchors[:, None] + torch.arange(block_size, **INTS)).flatten()


def block_mask(anchors: Tensor, num_context: int, block_size: int) -> Tensor:
    """What each block row may attend to: the context strictly before its anchor, and its own block.

    The block both ways, and nothing else. bool [anchors * block_size, num_context + anchors *
    block_size]; keys are the context, then all blocks.
    """
    in_context = torch.arange(num_context, **INTS) < anchors[:, None]
    in_own_block = torch.eye(len(anchors), **BOOLS).repeat_interleave(block_size, 1)
    mask_by_block = torch.cat((in_context, in_own_block), dim=1)
    return mask_by_block.repeat_interleave(block_size, 0)


def flex_mask(
    anchors: Sequence[Tensor], num_context: Sequence[int], block_size: int, device: torch.device
) -> BlockMask:
    """The same mask for several isolated sequences packed behind each other, for FlexAttention.

    Keys are all contexts, then all blocks; rows are all blocks. Sequence s has anchors[s] and
    num_context[s] context rows.
    """
    firsts = []  # of every sequence's blocks: the first key of its context
    num_keys = 0
    for own_anchors, own_context in zip(anchors, num_context, strict=True):
        firsts.append(torch.full((len(own_anchors),), num_keys, **INTS))
        num_keys += own_context
    first = torch.cat(firsts).to(device)
    end = first + torch.cat(list(anchors)).to(device)

    def is_seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block = row // block_size
        in_context = (first[block] <= key) & (key < end[block])
        in_own_block = (key >= num_keys) & ((key - num_keys) // block_size == block)
        return in_context | in_own_block

    num_rows = len(first) * block_size
    return create_block_mask(is_seen, None, None, num_rows, num_keys + num_rows, device=device)


# Batches.


class Positions(NamedTuple):
    """Absolute ones."""

    context: Tensor  # [context]
    rows: Tensor  # [rows]


class Span(NamedTuple):
    """Where one sequence lies in a batch."""

    context_start: int
    context_end: int
    row_start: int
    row_end: int

    @property
    def context(self) -> slice:
        return slice(self.context_start, self.context_end)

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_end)

    def blocks(self, block_size: int) -> slice:
        return slice(self.row_start // block_size, self.row_end // block_size)


@dataclass(frozen=True)
class Batch:
    """Block rows are [anchor, mask, mask, ...] per block.

    A row's label is the token at its own position.
    """

    features: Tensor  # [context, F * hidden]
    block_tokens: Tensor  # [rows]: anchor and masks of every block
    positions: Positions
    labels: Tensor  # [rows]; -1 at anchors and past the end
    previous: Tensor  # [rows]: the token one position before
    tokens: Tensor  # [context]
    next_tokens: Tensor  # [context]: the one after each of them, up to the last anchor
    offsets: Tensor  # [rows]: distance from the anchor
    spans: list[Span]  # one per sequence
    masks: list[Tensor]  # per sequence: block_mask; empty where `flex` is there
    numbers: list[int]  # per sequence: its sample's global number
    # [rows, hidden]: the target's state before each row's position, of which its law is made
    final: Tensor | None = None
    flex: BlockMask | None = None

    def to(self, device: torch.device) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(**tree_map_only(Tensor, moved, vars(self)))


def make_batch(
    samples: Numbered,
    config: DraftConfig,
    num_anchors: int,
    seed: int,
    *,
    min_context: int = 0,
    flex: torch.device | None = None,
) -> Batch:
    """At most `num_anchors` a sample, none with fewer than `min_context` tokens before it.

    Samples in which no anchor fits are left out; raises DataError where that is all of them.
    flex: the device on which one sparse mask is made, in place of a dense one per sequence.
    """
    numbers = []
    anchors = []  # of every sequence
    parts = []
    for number, sample in samples:
        first, end = anchor_bounds(sample.sizes, config, min_context)
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % 2**64)
        drawn = draw_anchors(first, end, num_anchors, generator)
        if len(drawn):
            numbers.append(number)
            anchors.append(drawn)
            parts.append(_part(sample, drawn, config))
    if not parts:
        raise DataError("no answer in this batch has two tokens", hint="regenerate longer answers")

    packed = {}
    for name in parts[0]:
        packed[name] = torch.cat([part[name] for part in parts])
    positions = Positions(context=packed.pop("context_positions"), rows=packed.pop("row_positions"))

    block_size = config.block_size
    num_context = [int(drawn[-1]) for drawn in anchors]  # nothing sees beyond the last anchor
    masks = []
    sparse_mask = None
    if flex is None:
        for drawn, count in zip(anchors, num_context, strict=True):
            masks.append(block_mask(drawn, count, block_size))
    else:
        sparse_mask = flex_mask(anchors, num_context, block_size, flex)
    return Batch(
        **packed,
        positions=positions,
        spans=_spans(anchors, num_context, block_size),
        masks=masks,
        numbers=numbers,
        flex=sparse_mask,
    )


def _part(sample: Sample, anchors: Tensor, config: DraftConfig) -> dict[str, Tensor]:
    """One sequence's share of a batch's tensors, by their names."""
    block_size = config.block_size
    num_context = int(anchors[-1])
    positions = block_positions(anchors, block_size)
    offsets = torch.arange(block_size, **INTS).repeat(len(anchors))
    is_anchor = offsets == 0
    padded = F.pad(sample.tokens, (0, block_size), value=-1)
    own_tokens = padded[positions]
    part = {
        "features": sample.features[:num_context],
        "block_tokens": torch.where(is_anchor, own_tokens, config.mask_token_id),
        "labels": torch.where(is_anchor, -1, own_tokens),
        "previous": padded[positions - 1].clamp(min=0),
        "tokens": sample.tokens[:num_context],
        "next_tokens": sample.tokens[1 : num_context + 1],
        "context_positions": torch.arange(num_context, **INTS),
        "row_positions": positions,
        "offsets": offsets,
    }
    if sample.final is not None:
        # What was recorded while decoding lacks the last tokens' states: no label without a law.
        num_final = len(sample.final)
        part["final"] = sample.final[(positions - 1).clamp(max=num_final - 1)]
        part["labels"] = part["labels"].masked_fill(positions > num_final, -1)
    return part


def _spans(anchors: Sequence[Tensor], num_context: Sequence[int], block_size: int) -> list[Span]:
    spans = []
    context_start = 0
    row_start = 0
    for own_anchors, own_context in zip(anchors, num_context, strict=True):
        context_end = context_start + own_context
        row_end = row_start + block_size * len(own_anchors)
        spans.append(Span(context_start, context_end, row_start, row_end))
        context_start = context_end
        row_start = row_end
    return spans


# Every method's pass.


class Pass(nn.Module):
    """A draft network's pass over a batch, all blocks of all sequences at once: what is trained."""

    def __init__(self, model: DraftNetwork, embed: Embed) -> None:
        super().__init__()
        self.model = model
        self.embed = embed

    def forward(self, batch: Batch) -> Tensor:
        """States of every block row [rows, hidden], normed where the network has a last norm."""
        return _PASSES[self.model.method](self.model, self.embed, batch)


def _dflash(model: DFlashDraftModel, embed: Embed, batch: Batch) -> Tensor:
    context = model.context(batch.features.to(model.norm.weight.dtype))
    kinds = model.config.masks  # of every layer
    masks_by_kind = {}
    for window, causal in dict.fromkeys(kinds):
        masks_by_kind[window, causal] = _narrowed_masks(batch, window, causal)

    def attend(
        layer: int, q: Tensor, context_kv: tuple[Tensor, Tensor], block_kv: tuple[Tensor, Tensor]
    ) -> Tensor:
        masks = masks_by_kind[kinds[layer]]
        return _attend(batch, masks, q, _KeysValues(*context_kv), _KeysValues(*block_kv))

    states: Tensor = model(context, embed(batch.block_tokens), batch.positions, attend)
    return states


def _narrowed_masks(batch: Batch, window: int | None, causal: bool) -> list[Tensor]:
    """The batch's masks as a layer with a window, or a causal one, has them."""
    if window is None and not causal:
        return batch.masks
    if batch.flex is not None:
        got = "this draft network has layers that are windowed or causal"
        raise CheckpointError(got, hint="train it without FlexAttention, or start from a plain one")

    masks = []
    for span, mask in zip(batch.spans, batch.masks, strict=True):
        rows = batch.positions.rows[span.rows]
        keys = torch.cat((batch.positions.context[span.context], rows))
        distance = rows[:, None] - keys
        if causal:
            mask = mask & (distance >= 0)
        if window is not None:
            mask = mask & (distance.abs() < window)
        masks.append(mask)
    return masks


def _medusa(model: MedusaDraftModel, _embed: Embed, batch: Batch) -> Tensor:
    """Every head reads the target's last state before the anchor."""
    before = _before_anchors(batch, model.config.block_size)
    states = batch.features[before.rows].float()
    with_anchors = torch.cat((states[:, None], model(states)), dim=1)
    return with_anchors.flatten(0, 1)


def _eagle3(model: Eagle3DraftModel, embed: Embed, batch: Batch) -> Tensor:
    """Training-time test (2503.01840, section 3.2), behind every anchor.

    The layer reads its own outputs, step by step. Of the sampled tokens only the states are the
    layer's own; the tokens are the answer's.
    """
    block_size = model.config.block_size
    before = _before_anchors(batch, block_size)
    fused = model.fc(batch.features.to(model.norm.weight.dtype))
    _, *context = model.project(embed(batch.next_tokens), fused, batch.positions.context)
    past = _KeysValues(*context)
    own: list[_KeysValues] = []  # by step: of every block [blocks, kv_heads, head_dim]

    states = fused[before.rows]
    tokens = batch.previous.view(-1, block_size)
    outputs = [states]
    for step in range(1, block_size):
        embedded = embed(tokens[:, step])
        q, keys, values = model.project(embedded, states, before.positions + step - 1)
        own.append(_KeysValues(keys, values))
        attended = []
        for span in batch.spans:
            blocks = span.blocks(block_size)
            own_past = past.of(span.context)
            own_steps = [each.of(blocks) for each in own]
            attended.append(_attend_steps(q[blocks], own_past, own_steps, before.positions[blocks]))
        finished = model.finish(states, torch.cat(attended))
        outputs.append(model.norm(finished))
        states = model.fed_back(finished)
    return torch.stack(outputs, dim=1).flatten(0, 1)


def _attend_steps(
    q: Tensor, past: _KeysValues, own: Sequence[_KeysValues], num_past: Tensor
) -> Tensor:
    """One sequence's blocks: each one's query over the pairs before its first own one, and its own.

    num_past: [blocks], how many pairs of the past a block sees; own: by step, of every block.
    """
    device = num_past.device
    places = torch.arange(len(past.keys), dtype=torch.int64, device=device)
    in_past = places < num_past[:, None]
    in_own_block = torch.eye(len(q), dtype=torch.bool, device=device)
    mask = torch.cat((in_past, in_own_block.repeat(1, len(own))), dim=1)
    keys = torch.cat([past.keys, *[each.keys for each in own]])
    values = torch.cat([past.values, *[each.values for each in own]])
    return _attention(q, keys, values, mask)


def _draft_model(model: CutDraftModel, embed: Embed, batch: Batch) -> Tensor:
    """A causal LM over whole texts: the state at the anchor guesses a block's one row behind it."""
    anchors = batch.positions.rows[::2]
    outputs = []
    for span in batch.spans:
        last_anchor = batch.next_tokens[span.context_end - 1 : span.context_end]
        text = torch.cat((batch.tokens[span.context], last_anchor))
        states = model(embed(text))[anchors[span.blocks(2)]]
        outputs.append(states.repeat_interleave(2, 0))
    return torch.cat(outputs)


_PASSES: dict[str, Callable[..., Tensor]] = {
    "dflash": _dflash,
    "eagle3": _eagle3,
    "medusa": _medusa,
    "draft_model": _draft_model,
}


class _BeforeAnchors(NamedTuple):
    """Of every block: the place before its anchor."""

    rows: Tensor  # of batch.features [blocks]
    positions: Tensor  # [blocks]


def _before_anchors(batch: Batch, block_size: int) -> _BeforeAnchors:
    positions = batch.positions.rows[::block_size] - 1
    starts = []
    for span in batch.spans:
        num_blocks = (span.row_end - span.row_start) // block_size
        starts.append(torch.full((num_blocks,), span.context_start, **INTS))
    rows = positions + torch.cat(starts).to(positions.device)
    return _BeforeAnchors(rows, positions)


# Attention.


class _KeysValues(NamedTuple):
    """[n, kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor

    def of(self, rows: slice) -> _KeysValues:
        return _KeysValues(self.keys[rows], self.values[rows])


def _attend(
    batch: Batch, masks: list[Tensor], q: Tensor, context: _KeysValues, block: _KeysValues
) -> Tensor:
    """Block rows over context and blocks.

    All sequences at once by the sparse mask, or one by one by their dense `masks`.
    """
    if batch.flex is not None:
        keys = torch.cat((context.keys, block.keys))
        values = torch.cat((context.values, block.values))
        return _attention(q, keys, values, batch.flex)

    outputs = []
    for span, mask in zip(batch.spans, masks, strict=True):
        keys = torch.cat((context.keys[span.context], block.keys[span.rows]))
        values = torch.cat((context.values[span.context], block.values[span.rows]))
        outputs.append(_attention(q[span.rows], keys, values, mask))
    return torch.cat(outputs)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """[n, heads, head_dim] over [m, kv_heads, head_dim] -> [n, heads * head_dim].

    mask: bool [n, m], or FlexAttention's.
    """
    dtype = queries.dtype
    q = queries.transpose(0, 1)[None]
    k = keys.transpose(0, 1)[None].to(dtype)
    v = values.transpose(0, 1)[None].to(dtype)
    if isinstance(mask, Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        attend: Callable[..., Tensor] = flex_attention
        if q.is_cuda:
            attend = _compiled_flex_attention()
        out = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


# FLOPs.


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered: FLOPs of matrix products and attention, both ways.

    By torch's own formulas, forward and backward; elementwise work is left out. torch's
    FlopCounterMode cannot be used: it follows modules, which fails inside `torch.autograd.grad`.
    """

    total = 0.0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        out = func(*args, **options)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **options, out_val=out)
        return out


def _cpu_attention(q: Tensor, k: Tensor, *_: object, **__: object) -> float:
    """Two products: of queries and keys, of weights and values.

    q: [b, heads, n, d], k: [b, any heads, m, d]
    """
    return 4.0 * q.shape[:3].numel() * k.shape[2] * q.shape[3]


def _cpu_attention_backward(_grad: Tensor, q: Tensor, k: Tensor, *_: object, **__: object) -> float:
    """The scores once more, and four products for two."""
    return 2.5 * _cpu_attention(q, k)


_ATEN = torch.ops.aten
_FORMULAS: dict[object, Callable[..., float]] = {
    **flop_registry,  # torch's table, and two that it lacks
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
