"""What a draft network is trained on: random anchors, the mask of a whole sequence's blocks, and the losses.

Pure functions of tensors; the only place for losses. Does not know optimizers, files or targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_mask", "block_positions", "chunked_loss", "draw_anchors", "flex_mask", "position_weights", "row_loss"]

Figures = dict[str, Tensor]


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


def flex_mask(anchors: Sequence[Tensor], num_context: Sequence[int], block_size: int, device: torch.device) -> Any:
    """The same mask for several sequences packed behind each other, isolated, as FlexAttention's BlockMask.

    Keys are all contexts, then all blocks; rows are all blocks. Sequence s has anchors[s] and num_context[s] context rows.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    owner = torch.cat([torch.full((n,), s) for s, n in enumerate(num_context)])
    place = torch.cat([torch.arange(n) for n in num_context])
    block_owner = torch.cat([torch.full((len(a),), s) for s, a in enumerate(anchors)]).repeat_interleave(block_size)
    anchor = torch.cat(list(anchors)).repeat_interleave(block_size)
    block = torch.arange(len(anchor)) // block_size
    key_owner = torch.cat((owner, torch.full_like(anchor, -1))).to(device)  # of context keys
    key_place = torch.cat((place, torch.zeros_like(anchor))).to(device)
    key_block = torch.cat((torch.full_like(owner, -1), block)).to(device)  # of block keys
    block_owner, anchor, block = (t.to(device) for t in (block_owner, anchor, block))

    def seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        in_context = (key_owner[key] == block_owner[row]) & (key_place[key] < anchor[row])
        return in_context | (key_block[key] == block[row])

    return create_block_mask(seen, None, None, len(anchor), len(key_owner), device=device)


def position_weights(kind: str, log_q: Tensor, offsets: Tensor, blocks: Tensor, *, gamma: float) -> Tensor:
    """Weight of every row: `decay` exp(-(k - 1) / gamma) at offset k (2602.06036, section 4), or `dpace` (2605.18810).

    D-PACE: with q_i the probability of the label at offset i, softened to (1 + q_i) / 2, w_j is the sum over m >= j of the
    product of the first m: what position j adds to the expected accepted length.
    log_q: [n] of the labels, detached; offsets: [n], 1 at the first masked position; blocks: [n] which block, ascending.
    """
    if kind == "decay":
        return torch.exp(-(offsets.to(log_q.dtype) - 1) / gamma)
    _, at = blocks.unique_consecutive(return_inverse=True)
    grid = log_q.new_full((int(at[-1]) + 1 if len(at) else 0, int(offsets.max()) if len(at) else 0), -torch.inf)
    grid[at, offsets - 1] = log_q
    survival = (0.5 + 0.5 * grid.exp()).cumprod(1) * (grid > -torch.inf)
    return survival.flip(1).cumsum(1).flip(1)[at, offsets - 1]


def row_loss(kind: str, logits: Tensor, labels: Tensor, target_logits: Tensor | None) -> Tensor:
    """[n]: `ce` against the label, or `kl` and `tv` (total variation) between the target's law over these columns and ours."""
    if kind == "ce":
        return F.cross_entropy(logits, labels, reduction="none")
    assert target_logits is not None
    law = target_logits.softmax(-1)
    if kind == "kl":
        return F.kl_div(logits.log_softmax(-1), law, reduction="none").sum(-1)
    return 0.5 * (logits.softmax(-1) - law).abs().sum(-1)


def chunked_loss(
    states: Tensor, parameters: Sequence[Tensor], chunks: Sequence[slice], part: Callable[[Tensor, slice], tuple[Tensor, Figures]]
) -> tuple[Tensor, float, Figures]:
    """The sum of part(states[chunk], chunk) with the logits of one chunk alive at a time.

    Each chunk's gradient with respect to its states [n, hidden] and to `parameters` (a head's) is taken at once. Returns a
    scalar whose gradients are those of the sum, the sum itself, and the parts' figures, joined along their first dimension.
    """
    grads = [torch.zeros_like(x) for x in (states, *parameters)]
    total, figures = 0.0, []
    for chunk in chunks:
        leaf = states[chunk].detach().requires_grad_()
        with torch.enable_grad():
            loss, figure = part(leaf, chunk)
        grads[0][chunk], *others = torch.autograd.grad(loss, (leaf, *parameters), allow_unused=True)
        for sum_, grad in zip(grads[1:], others, strict=True):
            if grad is not None:
                sum_ += grad
        total += float(loss.detach())
        figures.append(figure)
    surrogate: Any = sum((x * grad).sum() for x, grad in zip((states, *parameters), grads, strict=True))
    joined = {name: torch.cat([f[name] for f in figures]) for name in (figures[0] if figures else {})}
    return surrogate, total, joined
