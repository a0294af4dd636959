"""Medusa (2401.10774): K heads on the target's last state; head k guesses the token k places behind
the anchor.

head_k(h) = h + SiLU(W_k h + b_k), before the target's own lm_head (section 2.1.1; there, every head
has an output matrix of its own). h is the state that the anchor was drawn from, so nothing is
cached and all heads run at once. The heads do not see each other; a tree (section 2.1.2) holds the
likeliest tokens of each. Its shape is static: which ranks stand where never changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdraft.decoding.tree import NOTHING, Nodes, best_first, independent, planted
from flashdraft.formats.config import DraftConfig
from flashdraft.methods.network import DraftHead, DraftNetwork, Likely
from flashdraft.models.target import Target
from flashdraft.process import FLOATS, INTS, serial, undisturbed
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["MedusaDraftModel", "MedusaDrafter"]

_BRANCHES = 8  # tokens of a position that a tree may hold
# What the static tree supposes: a head's likeliest token is right so often, each next one so much
# more seldom.
_FIRST = 0.7
_FALL = 0.3


class MedusaDraftModel(DraftNetwork):
    """`block_size` - 1 heads. A new one changes nothing: its guess is the target's own next token
    again."""

    method = "medusa"

    @undisturbed
    def __init__(self, config: DraftConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.heads = nn.ModuleList()
        for _ in range(config.block_size - 1):
            self.heads.append(nn.Linear(hidden, hidden, **FLOATS))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor) -> Tensor:
        """The target's final normed states [n, hidden] -> [n, heads, hidden], for the lm_head."""
        guesses = [states + F.silu(head(states)) for head in self.heads]
        return torch.stack(guesses, dim=1)

    @undisturbed
    def drafters(self, target: Target) -> Callable[..., Drafter]:
        return functools.partial(MedusaDrafter, _Packed(self, target))


class _Packed(DraftHead):
    """All heads in one linear, beside one target."""

    def __init__(self, model: MedusaDraftModel, target: Target) -> None:
        super().__init__(model, target)
        weights = []
        biases = []
        for head in model.heads:
            assert isinstance(head, nn.Linear)
            weights.append(head.weight)
            biases.append(head.bias.detach())
        self.weight = self.packed(torch.cat(weights))
        self.bias = torch.cat(biases).to(self.probe)
        self.nbytes += self.weight.nbytes + self.bias.nbytes

    def likely(self, hidden: Tensor, count: int) -> Likely:
        """Of every head: states [n, hidden] -> [n, heads, count] each."""
        guessed = F.silu(self.weight(hidden) + self.bias)
        per_head = guessed.view(len(hidden), -1, hidden.shape[1])
        return super().likely(hidden[:, None] + per_head, count)


class MedusaDrafter(Drafter):
    """Chosen nodes: every head's likeliest token as a chain, or a static tree of `tree_nodes`
    nodes."""

    name = "medusa"

    def __init__(
        self, network: _Packed, *, block_size: int | None = None, tree_nodes: int | None = None
    ) -> None:
        self.network = network
        self.tree_nodes = tree_nodes
        most = network.config.block_size
        self.depth = (most if block_size is None else min(block_size, most)) - 1
        self.layers = (network.target.num_layers,)
        # By slot: the last final state, which the anchor was drawn from.
        self._states: dict[int, Tensor] = {}

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
        likely = self.network.likely(states, 1 if self.tree_nodes is None else _BRANCHES)
        num_nodes = depth + 1 if self.tree_nodes is None else self.tree_nodes
        count = min(num_nodes, max_nodes) - 1
        tree = _static_tree(depth, likely.tokens.shape[-1], count)
        tokens = likely.tokens.flatten(1)[:, tree.places].tolist()
        scores = likely.scores.flatten(1)[:, tree.places].tolist()
        grown = []
        for own_tokens, own_scores in zip(tokens, scores, strict=True):
            grown.append(Nodes(own_tokens, tree.parents, own_scores))
        return planted(rows.anchors, grown)

    def resume(self, source: int, slot: int, count: int) -> int:
        return count  # the next observation brings the one state that is needed

    def end(self, rows: Rows) -> None:
        for slot in rows.slots:
            self._states.pop(slot, None)


class _Tree(NamedTuple):
    """The shape of a tree over the heads' likeliest tokens."""

    places: list[int]  # of each node, in [depth * branches]
    parents: list[int]


@functools.cache
def _static_tree(depth: int, branches: int, count: int) -> _Tree:
    """The best tree of `count` nodes under one fixed law of ranks at every depth."""
    chances = [_FIRST * _FALL**rank for rank in range(branches)]
    law = torch.tensor(chances, **FLOATS).log().tolist()
    places = torch.arange(depth * branches, **INTS).view(depth, branches).tolist()
    laws = independent(-1, places, [law] * depth)
    nodes = best_first(-1, laws, count)
    return _Tree(nodes.tokens, nodes.parents)
