"""Drafts that cost nothing: tokens that a hook with a memory forces, such as a grammar's.

Knows proposals and the hooks' states. Does not know grammars, drafters or models. A forced token is
the only one that the target's law will allow there, so that a pass which reads it saves the pass
that would have written it, whichever method drafts, and also where none does.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashdraft.decoding.tree import Nodes
from flashdraft.process import FLOATS, INTS
from flashdraft.types import Proposal, Steering

__all__ = ["MOST_FORCED", "num_certain", "with_forced"]

MOST_FORCED = 64  # nodes that a row may get beyond its drafter's


def with_forced(proposal: Proposal, steering: Sequence[Steering | None]) -> Proposal:
    """The proposal, in which chosen nodes that the rows' hooks forbid give way to forced ones.

    steering: of each row, the hook's state behind the anchor; a row that has none keeps its nodes.
    Forced tokens stand behind every node that they follow, the anchor too, as its only child, with
    a score of certainty. Drawn nodes stay as they are, as their law wants it; only where the anchor
    itself is followed by forced tokens, which no drawn token decides, these stand alone.
    """
    rows = _Rows(proposal)
    for row, state in enumerate(steering):
        if state is None:
            continue
        if rows.is_drawn(row):
            if state.forced():
                rows.change(row, _grown(state, Nodes([], [], [])))
        else:
            rows.change(row, _grown(state, rows.nodes(row)))
    return rows.joined()


def num_certain(proposal: Proposal, steering: Sequence[Steering | None]) -> Tensor:
    """How many nodes of each row cannot be rejected: [rows], the anchor counted.

    Of a proposal that `with_forced` gave, these are the first ones. Each brings a token for a node,
    which is never less than plain decoding brings: a controller keeps them.
    """
    counts = torch.ones_like(proposal.sizes)
    for row, state in enumerate(steering):
        if state is not None:
            counts[row] += len(state.forced())
    return torch.minimum(counts, proposal.sizes)


def _grown(state: Steering, drafted: Nodes) -> Nodes:
    """What stands behind an anchor with this state; the drafted nodes keep their order."""
    tree = _Tree(state, len(drafted.tokens) + MOST_FORCED)
    tree.force(0)
    places: dict[int, int] = {0: 0}  # of the drafted nodes that are kept
    for node, token in enumerate(drafted.tokens, 1):
        above = places.get(drafted.parents[node - 1])
        if above is None:
            continue
        place = tree.add(above, token, drafted.scores[node - 1])
        if place is not None:
            places[node] = place
            tree.force(place)
    return tree.nodes


class _Tree:
    """Nodes behind an anchor, each with the hook's state behind it."""

    def __init__(self, state: Steering, most: int) -> None:
        self.nodes = Nodes([], [], [])
        self.most = most
        self.states = [state]
        self.places: dict[tuple[int, int], int] = {}  # by parent and token

    def add(self, parent: int, token: int, score: float) -> int | None:
        """The place of the parent's child with this token, a new one if need be.

        None where it is forbidden, and where there is no more room.
        """
        known = self.places.get((parent, token))
        if known is not None:
            return known
        state = self.states[parent]
        if len(self.nodes.tokens) == self.most or not state.allows(token):
            return None

        self.nodes.tokens.append(token)
        self.nodes.parents.append(parent)
        self.nodes.scores.append(score)
        self.states.append(state.then(token))
        place = len(self.nodes.tokens)
        self.places[parent, token] = place
        return place

    def force(self, place: int) -> None:
        """Let the tokens follow that are forced behind this node."""
        here: int | None = place
        for token in self.states[place].forced():
            if here is not None:
                here = self.add(here, token, 0.0)


class _Rows:
    """A proposal whose rows are changed one by one."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal = proposal
        self.changed: dict[int, Nodes] = {}

    def is_drawn(self, row: int) -> bool:
        drawn = self.proposal.drawn
        return drawn is not None and bool(drawn[row].any())

    def nodes(self, row: int) -> Nodes:
        proposal = self.proposal
        behind = slice(1, int(proposal.sizes[row]))
        tokens = proposal.tokens[row, behind].tolist()
        parents = proposal.parents[row, behind].tolist()
        scores = [0.0] * len(tokens)
        if proposal.scores is not None:
            scores = proposal.scores[row, behind].tolist()
        return Nodes(tokens, parents, scores)

    def change(self, row: int, nodes: Nodes) -> None:
        self.changed[row] = nodes

    def joined(self) -> Proposal:
        """The whole proposal, as wide as its rows are now."""
        if not self.changed:
            return self.proposal
        before = self.proposal
        sizes = before.sizes.clone()
        for row, nodes in self.changed.items():
            sizes[row] = 1 + len(nodes.tokens)

        width = max(int(sizes.max()), 1)
        as_chain = torch.arange(-1, width - 1, **INTS)
        tokens = _resized(before.tokens, width)
        parents = as_chain.repeat(len(sizes), 1)
        kept = min(width, before.num_nodes)
        parents[:, :kept] = before.parents[:, :kept]
        scores = None if before.scores is None else _resized(before.scores, width)
        drawn = None if before.drawn is None else _resized(before.drawn, width)
        probs = None if before.probs is None else _resized(before.probs, width)

        for row, nodes in self.changed.items():
            behind = slice(1, 1 + len(nodes.tokens))
            tokens[row, behind] = torch.tensor(nodes.tokens, **INTS)
            parents[row] = as_chain
            parents[row, behind] = torch.tensor(nodes.parents, **INTS)
            if scores is not None:
                scores[row, behind] = torch.tensor(nodes.scores, **FLOATS).to(scores)
            if drawn is not None:
                drawn[row] = False
        return replace(
            before,
            tokens=tokens,
            parents=parents,
            sizes=sizes,
            scores=scores,
            drawn=drawn,
            probs=probs,
        )


def _resized(values: Tensor, width: int) -> Tensor:
    """A copy with so many nodes: cut, or padded by zeros."""
    shape = (len(values), width, *values.shape[2:])
    resized = torch.zeros(shape, dtype=values.dtype, device=values.device)
    kept = min(width, values.shape[1])
    resized[:, :kept] = values[:, :kept]
    return resized
