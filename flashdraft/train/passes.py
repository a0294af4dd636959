"""Every method's training pass: a state for every block row of a batch.

The lm_head turns a state into a guess of the row's label. Does not know losses or optimizers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flashdraft.errors import CheckpointError
from flashdraft.methods.dflash import DFlashDraftModel
from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.methods.network import DraftNetwork
from flashdraft.process import INTS
from flashdraft.train.batch import Batch

__all__ = ["Pass"]

Embed = Callable[[Tensor], Tensor]  # the target's embedding


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
    fused = model.fuse(batch.features.to(model.norm.weight.dtype))
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
