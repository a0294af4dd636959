"""Random anchors, and sequences packed one behind the other, isolated by masks (SDPA's dense or FlexAttention's sparse)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._pytree import tree_map_only

from flashdraft.checkpoint import DraftConfig
from flashdraft.errors import DataError
from flashdraft.train.features import Sample

__all__ = ["Batch", "block_mask", "block_positions", "draw_anchors", "flex_mask", "make_batch"]

Numbered = Iterable[tuple[int, Sample]]  # samples with their global numbers, which key their anchors


def draw_anchors(num_prompt: int, num_tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` random positions, sorted, of response tokens (2602.06036, section 4: the first, too) with a successor."""
    candidates = torch.arange(num_prompt, max(num_prompt, num_tokens - 1))  # none where the answer was cut off
    chosen = torch.randperm(len(candidates), generator=generator)[:count]
    return candidates[chosen].sort().values


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """[anchors] -> [anchors * block_size] absolute positions; those past the sequence's end are masked out by the loss."""
    return (anchors[:, None] + torch.arange(block_size)).flatten()


def block_mask(anchors: Tensor, num_context: int, block_size: int) -> Tensor:
    """What each block row may attend to: context strictly before its anchor, and its own block both ways; nothing else.

    bool [anchors * block_size, num_context + anchors * block_size]; keys are the context, then all blocks.
    """
    context = torch.arange(num_context) < anchors[:, None]
    own = torch.eye(len(anchors), dtype=torch.bool)
    rows = torch.cat((context, own.repeat_interleave(block_size, 1)), dim=1)
    return rows.repeat_interleave(block_size, 0)


def flex_mask(anchors: Sequence[Tensor], num_context: Sequence[int], block_size: int, device: torch.device) -> Any:
    """The same mask for several sequences packed behind each other, isolated, as FlexAttention's BlockMask.

    Keys are all contexts, then all blocks; rows are all blocks. Sequence s has anchors[s] and num_context[s] context rows.
    """
    *starts, num_keys = itertools.accumulate(num_context, initial=0)
    counts = torch.tensor([len(each) for each in anchors])
    first = torch.tensor(starts).repeat_interleave(counts).to(device)  # of every block: its first context key
    end = first + torch.cat(list(anchors)).to(device)

    def seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        block = row // block_size
        in_context = (first[block] <= key) & (key < end[block])
        return in_context | ((key >= num_keys) & ((key - num_keys) // block_size == block))

    num_rows = len(first) * block_size
    return create_block_mask(seen, None, None, num_rows, num_keys + num_rows, device=device)


@dataclass(frozen=True)
class Batch:
    """Block rows are [anchor, mask, mask, ...] per block; a row's label is the token at its own position."""

    features: Tensor  # [context, F * hidden]
    block_tokens: Tensor  # [rows]: anchor and masks of every block
    positions: tuple[Tensor, Tensor]  # absolute, of context and block rows
    labels: Tensor  # [rows]; -1 at anchors and past the end
    previous: Tensor  # [rows]: the token one position before
    tokens: Tensor  # [context]
    next_tokens: Tensor  # [context]: the one after each of them, up to the last anchor
    offsets: Tensor  # [rows]: distance from the anchor
    spans: list[tuple[int, int, int, int]]  # per sequence: its context and its block rows
    masks: list[Tensor]  # per sequence: block_mask; empty where `flex` is there
    numbers: list[int]  # per sequence: its sample's global number
    final: Tensor | None = None  # [rows, hidden]: the target's state before each row's position, of which its law is made
    flex: Any = None

    def to(self, device: torch.device) -> Batch:
        return Batch(**tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), vars(self)))

    def number_of(self, row: int) -> int:
        """The global number of the sample that this block row is of."""
        return next(n for n, (_, _, first, last) in zip(self.numbers, self.spans, strict=True) if first <= row < last)


def make_batch(
    samples: Numbered, config: DraftConfig, num_anchors: int, seed: int, *, min_context: int = 0, flex: torch.device | None = None
) -> Batch:
    """No answer without two tokens, no anchor with fewer than `min_context` before it. flex: where to make one sparse mask."""
    size = config.block_size
    numbers, chosen, parts = list[int](), list[Tensor](), list[dict[str, Tensor]]()
    for number, sample in samples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        room = config.max_position_embeddings - size + 2  # decoding drafts nothing where a block would not fit
        first = max(sample.num_prompt, min_context)
        known = len(sample.tokens) if sample.final is None else len(sample.final) + 1  # an anchor has a label behind it
        anchors = draw_anchors(first, min(len(sample.tokens), known, room), num_anchors, generator)
        if len(anchors):
            numbers.append(number)
            chosen.append(anchors)
            parts.append(_part(sample, anchors, config))
    if not chosen:
        raise DataError("no answer in this batch has two tokens", hint="regenerate longer answers")
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    contexts = [int(anchors[-1]) for anchors in chosen]  # nothing sees further than the last anchor
    c, r = ([0, *itertools.accumulate(counts)] for counts in (contexts, [size * len(anchors) for anchors in chosen]))
    dense = [block_mask(anchors, context, size) for anchors, context in zip(chosen, contexts, strict=True) if flex is None]
    sparse = None if flex is None else flex_mask(chosen, contexts, size, flex)
    positions, spans = (joined.pop("contexts"), joined.pop("blocks")), list(zip(c, c[1:], r, r[1:], strict=False))
    return Batch(**joined, positions=positions, spans=spans, masks=dense, numbers=numbers, flex=sparse)


def _part(sample: Sample, anchors: Tensor, config: DraftConfig) -> dict[str, Tensor]:
    """One sequence's share of a batch's tensors."""
    size, num_context = config.block_size, int(anchors[-1])
    positions = block_positions(anchors, size)
    padded = F.pad(sample.tokens, (0, size), value=-1)
    offsets = torch.arange(size).repeat(len(anchors))
    part = {
        "features": sample.features[:num_context],
        "block_tokens": torch.where(offsets == 0, padded[positions], config.mask_token_id),
        "labels": torch.where(offsets == 0, -1, padded[positions]),
        "previous": padded[positions - 1].clamp(min=0),
        "tokens": sample.tokens[:num_context],
        "next_tokens": sample.tokens[1 : num_context + 1],
        "contexts": torch.arange(num_context),
        "blocks": positions,
        "offsets": offsets,
    }
    if sample.final is not None:  # what was recorded while decoding lacks the last tokens' states: no label without a law
        part["final"] = sample.final[(positions - 1).clamp(max=len(sample.final) - 1)]
        part["labels"] = part["labels"].masked_fill(positions > len(sample.final), -1)
    return part
