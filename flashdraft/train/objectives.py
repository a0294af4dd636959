"""What a draft network is trained on: random anchors, the mask of a whole sequence's blocks, and the loss.

Pure functions of tensors; the only place for losses. Does not know optimizers, files or targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_mask", "block_positions", "decayed_cross_entropy", "draw_anchors"]


def draw_anchors(num_prompt: int, num_tokens: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` random anchor positions, sorted, among the response tokens that have a successor to predict.

    The first response token may be an anchor: it is the first that decoding drafts from (2602.06036, section 4).
    """
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


def decayed_cross_entropy(logits: Tensor, labels: Tensor, offsets: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy with weight exp(-(k - 1) / gamma) at offset k from the anchor (2602.06036, section 4).

    logits: [n, vocab]; labels: [n], negative ones are left out; offsets: [n], 1 at the first masked position.
    Returns the loss and the weights' sum, so that micro-batches can be joined exactly.
    """
    weights = torch.exp(-(offsets.to(logits.dtype) - 1) / gamma) * (labels >= 0)
    losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    total = weights.sum()
    return (losses * weights).sum() / total.clamp(min=1e-9), total
