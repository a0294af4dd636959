"""What one step trains on: random anchors in the answers, and the blocks behind them.

Sequences are packed one behind the other and isolated by masks. A block is an anchor and the
positions behind it. Where blocks are filled in, a row's label is the token at its own position, and
what stands in a block's first row, the anchor's, is never looked at; in anchor-first blocks it is
the token one position behind, for the anchor's row too. All methods have the same anchors and
labels, so that they can be compared.
Does not know draft networks, losses, optimizers or the order of the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._pytree import tree_map_only

from flashdraft.errors import DataError
from flashdraft.formats.config import DraftConfig
from flashdraft.process import BOOLS, INTS
from flashdraft.train.features import Sample, Sizes

__all__ = [
    "Batch",
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

Numbered = Iterable[tuple[int, Sample]]  # with their global numbers, which key their anchors


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
    room = config.trained_length - config.block_rows + 2
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


def block_positions(anchors: Tensor, block_rows: int) -> Tensor:
    """[anchors] -> [anchors * block_rows] absolute positions.

    Those past the sequence's end are masked out by the loss.
    """
    return (anchors[:, None] + torch.arange(block_rows, **INTS)).flatten()


def block_mask(anchors: Tensor, num_context: int, block_rows: int) -> Tensor:
    """What each block row may attend to: the context strictly before its anchor, and its own block.

    The block both ways, and nothing else. bool [anchors * block_rows, num_context + anchors *
    block_rows]; keys are the context, then all blocks.
    """
    in_context = torch.arange(num_context, **INTS) < anchors[:, None]
    in_own_block = torch.eye(len(anchors), **BOOLS).repeat_interleave(block_rows, 1)
    mask_by_block = torch.cat((in_context, in_own_block), dim=1)
    return mask_by_block.repeat_interleave(block_rows, 0)


def flex_mask(
    anchors: Sequence[Tensor], num_context: Sequence[int], block_rows: int, device: torch.device
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
        block = row // block_rows
        in_context = (first[block] <= key) & (key < end[block])
        in_own_block = (key >= num_keys) & ((key - num_keys) // block_rows == block)
        return in_context | in_own_block

    num_rows = len(first) * block_rows
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

    def blocks(self, block_rows: int) -> slice:
        return slice(self.row_start // block_rows, self.row_end // block_rows)


@dataclass(frozen=True)
class Batch:
    """Block rows are [anchor, mask, mask, ...] per block.

    A row's label is the token at its own position, or in anchor-first blocks at the next one.
    """

    features: Tensor  # [context, F * hidden]
    block_tokens: Tensor  # [rows]: anchor and masks of every block
    positions: Positions
    labels: Tensor  # [rows]; -1 past the end, and where the anchor's row predicts nothing
    previous: Tensor  # [rows]: the token one position before the label
    tokens: Tensor  # [context]
    next_tokens: Tensor  # [context]: the one after each of them, up to the last anchor
    offsets: Tensor  # [rows]: the label's distance from the anchor
    spans: list[Span]  # one per sequence
    masks: list[Tensor]  # per sequence: block_mask; empty where `flex` is there
    numbers: list[int]  # per sequence: its sample's global number
    # [rows, hidden]: the target's state before each row's label, of which its law is made
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

    num_rows = config.block_rows
    num_context = [int(drawn[-1]) for drawn in anchors]  # nothing sees beyond the last anchor
    masks = []
    sparse_mask = None
    if flex is None:
        for drawn, count in zip(anchors, num_context, strict=True):
            masks.append(block_mask(drawn, count, num_rows))
    else:
        sparse_mask = flex_mask(anchors, num_context, num_rows, flex)
    return Batch(
        **packed,
        positions=positions,
        spans=_spans(anchors, num_context, num_rows),
        masks=masks,
        numbers=numbers,
        flex=sparse_mask,
    )


def _part(sample: Sample, anchors: Tensor, config: DraftConfig) -> dict[str, Tensor]:
    """One sequence's share of a batch's tensors, by their names."""
    num_rows = config.block_rows
    num_context = int(anchors[-1])
    positions = block_positions(anchors, num_rows)
    is_anchor = (torch.arange(num_rows, **INTS) == 0).repeat(len(anchors))

    # Where the labels stand: at the rows' own positions, or one behind them.
    shift = 1 if config.anchor_first else 0
    places = positions + shift
    offsets = (torch.arange(num_rows, **INTS) + shift).repeat(len(anchors))
    padded = F.pad(sample.tokens, (0, config.block_size), value=-1)
    part = {
        "features": sample.features[:num_context],
        "block_tokens": torch.where(is_anchor, padded[positions], config.mask_token_id),
        "labels": torch.where(offsets == 0, -1, padded[places]),
        "previous": padded[places - 1].clamp(min=0),
        "tokens": sample.tokens[:num_context],
        "next_tokens": sample.tokens[1 : num_context + 1],
        "context_positions": torch.arange(num_context, **INTS),
        "row_positions": positions,
        "offsets": offsets,
    }
    if sample.final is not None:
        # What was recorded while decoding lacks the last tokens' states: no label without a law.
        num_final = len(sample.final)
        part["final"] = sample.final[(places - 1).clamp(max=num_final - 1)]
        part["labels"] = part["labels"].masked_fill(places > num_final, -1)
    return part


def _spans(anchors: Sequence[Tensor], num_context: Sequence[int], block_rows: int) -> list[Span]:
    spans = []
    context_start = 0
    row_start = 0
    for own_anchors, own_context in zip(anchors, num_context, strict=True):
        context_end = context_start + own_context
        row_end = row_start + block_rows * len(own_anchors)
        spans.append(Span(context_start, context_end, row_start, row_end))
        context_start = context_end
        row_start = row_end
    return spans
