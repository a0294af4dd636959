"""Medusa (2401.10774): K heads on the target's last state; head k guesses the token k places behind the anchor.

head_k(h) = h + SiLU(W_k h + b_k), before the target's own lm_head (section 2.1.1; there, every head has an output matrix of its
own). h is the state that the anchor was drawn from, so nothing is cached and all heads run at once. The heads do not see each
other; a tree (section 2.1.2) holds the likeliest tokens of each. Its shape is static: which ranks stand where never changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Nodes, best_first, independent, planted
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DraftHead, DraftNetwork
from flashdraft.models.target import Target
from flashdraft.process import FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["MedusaDraftModel", "MedusaDrafter"]

_BRANCHES = 8  # tokens of a position that a tree may hold
_FIRST, _FALL = (
    0.7,
    0.3,
)  # the static tree supposes: a head's likeliest token is right so often, each next one so much less


class MedusaDraftModel(DraftNetwork):
    """`block_size` - 1 heads. A new one changes nothing: its guess is the target's own next token again."""

    method = "medusa"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        heads = [
            nn.Linear(config.hidden_size, config.hidden_size, **FLOATS)
            for _ in range(config.block_size - 1)
        ]
        self.heads: Any = nn.ModuleList(heads)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor) -> Tensor:
        """The target's final normed states [n, hidden] -> [n, heads, hidden], for the lm_head."""
        return torch.stack([states + F.silu(head(states)) for head in self.heads], dim=1)

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        return functools.partial(MedusaDrafter, _Packed(self, target))


class _Packed(DraftHead):
    def __init__(self, model: MedusaDraftModel, target: Target) -> None:
        super().__init__(model, target)
        self.weight = self.packed(
            torch.cat([head.weight for head in model.heads])
        )  # all heads in one linear
        self.bias = torch.cat([head.bias.detach() for head in model.heads]).to(self.probe)
        self.nbytes += self.weight.nbytes + self.bias.nbytes

    def likely(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of every head: states [n, hidden] -> [n, heads, count] each."""
        corrected = hidden[:, None] + F.silu(self.weight(hidden) + self.bias).view(
            len(hidden), -1, hidden.shape[1]
        )
        return super().likely(corrected, count)


class MedusaDrafter(Drafter):
    """Chosen nodes: every head's likeliest token as a chain, or a static tree of `tree_nodes` nodes."""

    name = "medusa"

    def __init__(
        self, network: _Packed, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        self.network, self.tree_nodes = network, tree_nodes
        self.depth = min(block_size or network.config.block_size, network.config.block_size) - 1
        self.layers = (network.target.num_layers,)
        self._states: dict[
            int, Tensor
        ] = {}  # by slot: the last final state, which the anchor was drawn from

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        assert features is not None
        for slot, new in zip(rows.slots, features, strict=True):
            self._states[slot] = new[-1].clone()

    @undisturbed
    @serial(lambda self: self.network.native)
    @torch.inference_mode()
    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        depth = min(self.depth, max_nodes - 1)
        if depth < 1:
            return planted(rows.anchors, [NOTHING] * len(rows))
        states = torch.stack([self._states[slot] for slot in rows.slots])
        found = self.network.likely(states, _BRANCHES if self.tree_nodes else 1)
        places, parents = _static(
            depth, found[0].shape[-1], min(self.tree_nodes or depth + 1, max_nodes) - 1
        )
        laws = zip(*(t.flatten(1)[:, places].tolist() for t in found), strict=True)
        return planted(rows.anchors, [Nodes(tokens, parents, scores) for tokens, scores in laws])

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            self._states.pop(slot, None)


@functools.cache
def _static(depth: int, branches: int, count: int) -> tuple[list[int], list[int]]:
    """A tree's places in [depth * branches], and its parents: the best one under one fixed law of ranks at every depth."""
    law = torch.tensor([_FIRST * _FALL**rank for rank in range(branches)], **FLOATS).log().tolist()
    places = torch.arange(depth * branches, **INTS).view(depth, branches).tolist()
    return best_first(-1, independent(-1, places, [law] * depth), count)[:2]
