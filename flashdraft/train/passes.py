"""The rivals' passes over a batch: the same blocks, labels and losses as DFlash's, so that data and FLOPs can be compared.

A block is an anchor and the positions behind it; a pass gives a state for every block row, which the lm_head turns into a guess
of the row's own token. What stands in a block's first row, the anchor's, is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.methods.draft_model import CutDraftModel
from flashdraft.methods.eagle3 import Eagle3DraftModel
from flashdraft.methods.medusa import MedusaDraftModel
from flashdraft.train.batch import Batch, Blocks

__all__ = ["PASSES", "CausalPass", "Eagle3Pass", "MedusaPass"]


class MedusaPass(nn.Module):
    """Every head reads the target's last state before the anchor."""

    def __init__(self, model: MedusaDraftModel, _embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """[rows, hidden]"""
        places, _ = _before_anchors(batch, self.model.config.block_size)
        states = batch.features[places].float()
        return torch.cat((states[:, None], self.model(states)), dim=1).flatten(0, 1)


class Eagle3Pass(nn.Module):
    """Training-time test (2503.01840, section 3.2): behind every anchor the layer reads its own outputs, step by step.

    Of the sampled tokens only the states are the layer's own; the tokens are the answer's.
    """

    def __init__(self, model: Eagle3DraftModel, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.embed = model, embed

    def forward(self, batch: Batch) -> Tensor:
        """Normed states [rows, hidden]."""
        model, size = self.model, self.model.config.block_size
        places, before = _before_anchors(batch, size)
        fused = model.fc(batch.features.to(model.norm.weight.dtype))
        _, keys, values = model.project(self.embed(batch.next_tokens), fused, batch.positions[0])
        states, tokens = fused[places], batch.previous.view(-1, size)
        own: list[tuple[Tensor, Tensor]] = []  # by step: keys and values of every block [blocks, kv_heads, head_dim]
        outputs = [states]
        for step in range(1, size):
            q, *kv = model.project(self.embed(tokens[:, step]), states, before + step - 1)
            own.append((kv[0], kv[1]))
            states = model.finish(states, _attend(batch, size, q, (keys, values), own))
            outputs.append(model.norm(states))
        return torch.stack(outputs, dim=1).flatten(0, 1)


class CausalPass(nn.Module):
    """A causal LM over whole texts; a block's one row behind the anchor is guessed by the state at the anchor."""

    def __init__(self, model: CutDraftModel, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.embed = model, embed

    def forward(self, batch: Batch) -> Tensor:
        """[rows, hidden]"""
        outputs, anchors = [], batch.positions[1][::2]
        for c0, c1, r0, r1 in batch.spans:
            text = torch.cat((batch.tokens[c0:c1], batch.next_tokens[c1 - 1 : c1]))  # up to the last anchor
            states = self.model(self.embed(text))[anchors[r0 // 2 : r1 // 2]]
            outputs.append(states.repeat_interleave(2, 0))
        return torch.cat(outputs)


def _before_anchors(batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Of every block: the row of batch.features before its anchor, and that row's position."""
    before = batch.positions[1][::size] - 1
    firsts = [torch.full(((r1 - r0) // size,), c0) for c0, _, r0, r1 in batch.spans]
    return before + torch.cat(firsts).to(before.device), before


def _attend(batch: Batch, size: int, q: Tensor, context: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Each block's query over the pairs before its first own one, and its own: [blocks, heads * head_dim]."""
    outputs = []
    before = batch.positions[1][::size] - 1
    for c0, c1, r0, r1 in batch.spans:
        blocks = slice(r0 // size, r1 // size)
        count = blocks.stop - blocks.start
        past = torch.arange(c1 - c0, device=before.device) < before[blocks, None]
        mask = torch.cat((past, torch.eye(count, dtype=torch.bool, device=before.device).repeat(1, len(own))), dim=1)
        sides: Any = zip(context, *own, strict=True)
        k, v = (torch.cat((old[c0:c1], *(new[blocks] for new in news))).transpose(0, 1)[None].to(q.dtype) for old, *news in sides)
        out = F.scaled_dot_product_attention(q[blocks].transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)


PASSES: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], nn.Module]] = {
    "dflash": Blocks,
    "eagle3": Eagle3Pass,
    "medusa": MedusaPass,
    "draft_model": CausalPass,
}
