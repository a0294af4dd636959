"""Which slots of a cache a node may attend to, as masks that torch's attention takes.

A pass writes its nodes behind the length of their row: node j of a row lies in slot length + j.
What lies below the length is committed text, and every node sees it; among the nodes of the pass,
the proposal says who sees whom. A block may hide some of both, by its window or by being causal.

Knows lengths, nodes and slots. Does not know layers, heads or what a slot holds.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mask", "Places", "additive_masks"]


class Mask(NamedTuple):
    """What one block hides of that which a node would see."""

    window: int | None  # a node sees fewer than so many slots back, and as few ahead
    causal: bool  # a node sees no node that comes after it


class Places(NamedTuple):
    """Where the tokens of a pass belong: [tokens] each."""

    row: Tensor
    node: Tensor | None  # None: all nodes of all rows come in order
    slot: Tensor


def additive_masks(
    masks: Iterable[Mask], starts: Tensor, seen: Tensor, num_slots: int, dtype: torch.dtype
) -> dict[Mask, Tensor]:
    """By mask, 0 where a node sees a slot and -inf elsewhere: [rows, nodes, slots] each.

    starts: what the rows hold [rows]; seen: who sees whom, bool [rows, nodes, nodes].
    """
    rows, width = seen.shape[:2]
    slots = torch.arange(num_slots, dtype=torch.int64, device=starts.device)
    nodes = torch.arange(width, dtype=torch.int64, device=starts.device)
    node_in_slot = (slots - starts[:, None])[:, None]  # [rows, 1, slots]; negative: committed text
    ahead = node_in_slot - nodes[:, None]  # slots from a node to what it may see
    nearest_node = node_in_slot.clamp(0, width - 1).expand(rows, width, -1)

    additive = {}
    for mask in dict.fromkeys(masks):
        window, causal = mask
        own = (seen.tril() if causal else seen).gather(2, nearest_node)
        visible = (node_in_slot < 0) | ((node_in_slot < width) & own)
        if window is not None:
            visible = visible & (ahead > -window) & (ahead < window)

        # Who would see nothing is padding and reads the first slot: a softmax needs something.
        sees_nothing = ~visible.any(-1, keepdim=True)
        visible = visible | (sees_nothing & (slots == 0))
        zeros = torch.zeros_like(visible, dtype=dtype)
        additive[mask] = zeros.masked_fill(~visible, -torch.inf)
    return additive
