"""Random anchors, sequences packed one behind the other and isolated by masks, and every method's training pass over them.

A block is an anchor and the positions behind it; a pass gives a state for every block row, which the lm_head turns into a guess
of the row's own token. What stands in a block's first row, the anchor's, is never looked at. All methods have the same blocks,
labels and losses, and FLOPs are counted by one function, so that they can be compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
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
    "anchor_bounds",
    "block_mask",
    "block_positions",
    "draw_anchors",
    "flex_mask",
]
__all__ += ["make_batch", "why_no_anchor"]

Embed = Callable[[Tensor], Tensor]  # the target's embedding
Numbered = Iterable[
    tuple[int, Sample]
]  # samples with their global numbers, which key their anchors
_compiled = functools.cache(functools.partial(torch.compile, dynamic=True))


def draw_anchors(
    num_prompt: int, num_tokens: int, count: int, generator: torch.Generator
) -> Tensor:
    """At most `count` random positions, sorted, of response tokens (2602.06036, section 4: the first, too) with a successor."""
    candidates = torch.arange(
        num_prompt, max(num_prompt, num_tokens - 1), **INTS
    )  # none where the answer was cut off
    chosen = torch.randperm(len(candidates), generator=generator, **INTS)[:count]
    return candidates[chosen].sort().values


def anchor_bounds(sizes: Sizes, config: DraftConfig, min_context: int = 0) -> tuple[int, int]:
    """Anchors of a sample lie from the first of these positions on; the token before the second one is the last label."""
    room = (
        config.trained_length - config.block_size + 2
    )  # no block ends beyond the positions that the network is made for
    known = (
        sizes.num_tokens if sizes.num_final is None else sizes.num_final + 1
    )  # an anchor has a label behind it
    return max(sizes.num_prompt, min_context), min(sizes.num_tokens, known, room)


def why_no_anchor(sizes: Sizes, config: DraftConfig, min_context: int = 0) -> str:
    """Why nothing can be learned from a sample; empty where something can."""
    first, end = anchor_bounds(sizes, config, min_context)
    if first + 1 < end:
        return ""
    if sizes.num_prompt + 1 >= sizes.num_tokens:
        return f"{max(0, sizes.num_tokens - sizes.num_prompt)} tokens of its answer are there, two are needed"
    if sizes.num_prompt + 1 >= end:
        return f"its answer begins at {sizes.num_prompt}, behind the drafter's {config.trained_length} positions"
    return f"it ends at {sizes.num_tokens}, too early for min_context {min_context}"


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """[anchors] -> [anchors * block_size] absolute positions; those past the sequence's end are masked out by the loss."""
    return (anchors[:, None] + torch.arange(block_size, **INTS)).flatten()


def block_mask(anchors: Tensor, num_context: int, block_size: int) -> Tensor:
    """What each block row may attend to: context strictly before its anchor, and its own block both ways; nothing else.

    bool [anchors * block_size, num_context + anchors * block_size]; keys are the context, then all blocks.
    """
    context = torch.arange(num_context, **INTS) < anchors[:, None]
    own = torch.eye(len(anchors), **BOOLS)
    rows = torch.cat((context, own.repeat_interleave(block_size, 1)), dim=1)
    return rows.repeat_interleave(block_size, 0)


def flex_mask(
    anchors: Sequence[Tensor], num_context: Sequence[int], block_size: int, device: torch.device
) -> Any:
    """The same mask for several sequences packed behind each other, isolated, as FlexAttention's BlockMask.

    Keys are all contexts, then all blocks; rows are all blocks. Sequence s has anchors[s] and num_context[s] context rows.
    """
    *starts, num_keys = itertools.accumulate(num_context, initial=0)
    counts = torch.tensor([len(each) for each in anchors], **INTS)
    first = (
        torch.tensor(starts, **INTS).repeat_interleave(counts).to(device)
    )  # of every block: its first context key
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
    final: Tensor | None = (
        None  # [rows, hidden]: the target's state before each row's position, of which its law is made
    )
    flex: Any = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            **tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), vars(self))
        )


def make_batch(
    samples: Numbered,
    config: DraftConfig,
    num_anchors: int,
    seed: int,
    *,
    min_context: int = 0,
    flex: torch.device | None = None,
) -> Batch:
    """No answer without two tokens, no anchor with fewer than `min_context` before it. flex: where to make one sparse mask."""
    numbers, chosen, parts = list[int](), list[Tensor](), list[dict[str, Tensor]]()
    for number, sample in samples:
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % 2**64)
        anchors = draw_anchors(
            *anchor_bounds(sample.sizes, config, min_context), num_anchors, generator
        )
        if len(anchors):
            numbers.append(number)
            chosen.append(anchors)
            parts.append(_part(sample, anchors, config))
    if not chosen:
        raise DataError("no answer in this batch has two tokens", hint="regenerate longer answers")
    size = config.block_size
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    contexts = [int(anchors[-1]) for anchors in chosen]  # nothing sees further than the last anchor
    c, r = (
        [0, *itertools.accumulate(counts)]
        for counts in (contexts, [size * len(anchors) for anchors in chosen])
    )
    dense = [
        block_mask(anchors, context, size)
        for anchors, context in zip(chosen, contexts, strict=True)
        if flex is None
    ]
    sparse = None if flex is None else flex_mask(chosen, contexts, size, flex)
    positions, spans = (
        (joined.pop("contexts"), joined.pop("blocks")),
        list(zip(c, c[1:], r, r[1:], strict=False)),
    )
    return Batch(
        **joined, positions=positions, spans=spans, masks=dense, numbers=numbers, flex=sparse
    )


def _part(sample: Sample, anchors: Tensor, config: DraftConfig) -> dict[str, Tensor]:
    """One sequence's share of a batch's tensors."""
    size, num_context = config.block_size, int(anchors[-1])
    positions = block_positions(anchors, size)
    padded = F.pad(sample.tokens, (0, size), value=-1)
    offsets = torch.arange(size, **INTS).repeat(len(anchors))
    part = {
        "features": sample.features[:num_context],
        "block_tokens": torch.where(offsets == 0, padded[positions], config.mask_token_id),
        "labels": torch.where(offsets == 0, -1, padded[positions]),
        "previous": padded[positions - 1].clamp(min=0),
        "tokens": sample.tokens[:num_context],
        "next_tokens": sample.tokens[1 : num_context + 1],
        "contexts": torch.arange(num_context, **INTS),
        "blocks": positions,
        "offsets": offsets,
    }
    if (
        sample.final is not None
    ):  # what was recorded while decoding lacks the last tokens' states: no label without a law
        part["final"] = sample.final[(positions - 1).clamp(max=len(sample.final) - 1)]
        part["labels"] = part["labels"].masked_fill(positions > len(sample.final), -1)
    return part


class Pass(nn.Module):
    """A draft network's pass over a batch, all blocks of all sequences at once: what is trained."""

    def __init__(self, model: DraftNetwork, embed: Embed) -> None:
        super().__init__()
        self.model, self.embed = model, embed

    def forward(self, batch: Batch) -> Tensor:
        """States of every block row [rows, hidden], normed where the network has a last norm."""
        return _PASSES[self.model.method](self.model, self.embed, batch)  # type: ignore[no-any-return]


def _dflash(model: DFlashDraftModel, embed: Embed, batch: Batch) -> Tensor:
    context = model.context(batch.features.to(model.norm.weight.dtype))
    masks = model.config.masks
    seen = {mask: _seen(batch, *mask) for mask in dict.fromkeys(masks)}

    def attend(
        layer: int, q: Tensor, context_kv: tuple[Tensor, ...], block_kv: tuple[Tensor, ...]
    ) -> Tensor:
        return _attend(batch, seen[masks[layer]], q, context_kv, block_kv)

    return model(context, embed(batch.block_tokens), batch.positions, attend)  # type: ignore[no-any-return]


def _seen(batch: Batch, window: int | None, causal: bool) -> list[Tensor]:
    """The batch's masks as a layer with a window, or a causal one, has them."""
    if window is None and not causal:
        return batch.masks
    if batch.flex is not None:
        got = "this draft network has layers that are windowed or causal"
        raise CheckpointError(got, hint="train it without FlexAttention, or start from a plain one")

    masks = []
    for (c0, c1, r0, r1), whole in zip(batch.spans, batch.masks, strict=True):
        rows = batch.positions[1][r0:r1]
        keys = torch.cat((batch.positions[0][c0:c1], rows))
        behind = rows[:, None] - keys
        mask = whole & (behind >= 0) if causal else whole
        masks.append(mask if window is None else mask & (behind.abs() < window))
    return masks


def _medusa(model: MedusaDraftModel, _embed: Embed, batch: Batch) -> Tensor:
    """Every head reads the target's last state before the anchor."""
    states = batch.features[_before_anchors(batch, model.config.block_size)[0]].float()
    return torch.cat((states[:, None], model(states)), dim=1).flatten(0, 1)


def _eagle3(model: Eagle3DraftModel, embed: Embed, batch: Batch) -> Tensor:
    """Training-time test (2503.01840, section 3.2): behind every anchor the layer reads its own outputs, step by step.

    Of the sampled tokens only the states are the layer's own; the tokens are the answer's.
    """
    size = model.config.block_size
    places, before = _before_anchors(batch, size)
    fused = model.fc(batch.features.to(model.norm.weight.dtype))
    _, *context = model.project(embed(batch.next_tokens), fused, batch.positions[0])
    states, tokens = fused[places], batch.previous.view(-1, size)
    own: list[
        tuple[Tensor, ...]
    ] = []  # by step: keys and values of every block [blocks, kv_heads, head_dim]
    outputs = [states]
    for step in range(1, size):
        q, *kv = model.project(embed(tokens[:, step]), states, before + step - 1)
        own.append(tuple(kv))
        attended = []
        for (
            c0,
            c1,
            r0,
            r1,
        ) in batch.spans:  # each block's query over the pairs before its first own one, and its own
            blocks = slice(r0 // size, r1 // size)
            past = (
                torch.arange(c1 - c0, dtype=torch.int64, device=before.device)
                < before[blocks, None]
            )
            mask = torch.cat(
                (
                    past,
                    torch.eye(len(past), dtype=torch.bool, device=before.device).repeat(1, step),
                ),
                dim=1,
            )
            sides: Any = zip(context, *own, strict=True)
            keys, values = (
                torch.cat((old[c0:c1], *(new[blocks] for new in news))) for old, *news in sides
            )
            attended.append(_attention(q[blocks], keys, values, mask))
        finished = model.finish(states, torch.cat(attended))
        outputs.append(model.norm(finished))
        states = model.fed_back(finished)
    return torch.stack(outputs, dim=1).flatten(0, 1)


def _draft_model(model: CutDraftModel, embed: Embed, batch: Batch) -> Tensor:
    """A causal LM over whole texts; a block's one row behind the anchor is guessed by the state at the anchor."""
    outputs, anchors = [], batch.positions[1][::2]
    for c0, c1, r0, r1 in batch.spans:
        text = torch.cat(
            (batch.tokens[c0:c1], batch.next_tokens[c1 - 1 : c1])
        )  # up to the last anchor
        outputs.append(model(embed(text))[anchors[r0 // 2 : r1 // 2]].repeat_interleave(2, 0))
    return torch.cat(outputs)


_PASSES: dict[str, Any] = {
    "dflash": _dflash,
    "eagle3": _eagle3,
    "medusa": _medusa,
    "draft_model": _draft_model,
}


def _before_anchors(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Of every block: the row of batch.features before its anchor, and that row's position."""
    before = batch.positions[1][::size] - 1
    firsts = [torch.full(((r1 - r0) // size,), c0, **INTS) for c0, _, r0, r1 in batch.spans]
    return before + torch.cat(firsts).to(before.device), before


def _attend(
    batch: Batch,
    masks: list[Tensor],
    q: Tensor,
    context_kv: tuple[Tensor, ...],
    block_kv: tuple[Tensor, ...],
) -> Tensor:
    pairs = list(zip(context_kv, block_kv, strict=True))  # of keys, of values
    if batch.flex is not None:
        return _attention(q, torch.cat(pairs[0]), torch.cat(pairs[1]), batch.flex)
    outputs = []
    for (c0, c1, r0, r1), mask in zip(batch.spans, masks, strict=True):
        keys, values = (torch.cat((context[c0:c1], block[r0:r1])) for context, block in pairs)
        outputs.append(_attention(q[r0:r1], keys, values, mask))
    return torch.cat(outputs)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
    """[n, heads, head_dim] over [m, kv_heads, head_dim] -> [n, heads * head_dim]; mask: bool [n, m], or FlexAttention's."""
    q, k, v = (x.transpose(0, 1)[None].to(queries.dtype) for x in (queries, keys, values))
    if isinstance(mask, Tensor):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        attend: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
        out = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


class FlopCount(TorchDispatchMode):
    """`total` grows while this mode is entered: FLOPs of matrix products and attention, forward and backward.

    By torch's own formulas; elementwise work is left out. torch's FlopCounterMode cannot be used: it follows modules, which
    fails inside `torch.autograd.grad`.
    """

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _cpu_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> float:
    """Two products: of queries and keys, of weights and values. q: [b, heads, n, d], k: [b, any heads, m, d]"""
    return 4.0 * q.shape[:3].numel() * k.shape[2] * q.shape[3]


_FORMULAS: dict[Any, Callable[..., float]] = (
    flop_registry
    | {  # torch's table, and two that it lacks
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:  # the scores once more, and four products for two
        lambda _, q, k, *rest, **options: 2.5 * _cpu_attention(q, k),
    }
)
