"""Shapes of proposals, as functions of `parents`.

Knows node indices only. Does not know what their tokens mean, who proposed them, or what the target
thinks of them. `parents` is [rows, nodes] int64: -1 at the anchor (node 0), otherwise a smaller
index; a chain is -1, 0, 1, 2, ...
"""

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from flashdraft.process import FLOATS, INTS
from flashdraft.types import Proposal

__all__ = [
    "NOTHING",
    "Law",
    "Laws",
    "Nodes",
    "alone",
    "ancestors",
    "best_first",
    "chain",
    "check",
    "depths",
    "independent",
    "planted",
    "spread",
]


class Nodes(NamedTuple):
    """What grew behind one anchor, parents before children.

    The anchor itself is node 0 and not in the lists.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]  # log-confidence, given the parent


NOTHING = Nodes([], [], [])
Law = tuple[Sequence[int], Sequence[float]]  # tokens and their log-probabilities, descending
Laws = Mapping[int, Law]  # of one depth, by the token before


def chain(num_nodes: int) -> Tensor:
    """Parents of a chain of `num_nodes`, the anchor included: [nodes] int64."""
    return torch.arange(-1, num_nodes - 1, **INTS)


def ancestors(parents: Tensor) -> Tensor:
    """What a node sees: itself and its ancestors.

    parents: [rows, nodes]. Returns bool [rows, nodes, nodes]; at [r, i, j]: node i sees node j.
    """
    num_rows, num_nodes = parents.shape
    nodes = torch.arange(num_nodes, dtype=torch.int64, device=parents.device)
    all_chains = bool((parents == nodes - 1).all())  # a prompt is one
    if all_chains:
        triangle = nodes[:, None] >= nodes
        return triangle.expand(num_rows, -1, -1)

    visible = torch.zeros(num_rows, num_nodes, num_nodes, dtype=torch.bool, device=parents.device)
    above = nodes.expand_as(parents)
    for _ in nodes:  # never more climbs than nodes, even if `parents` were wrong
        visible |= above[:, :, None] == nodes
        one_higher = parents.gather(1, above.clamp(min=0))
        above = torch.where(above < 0, above, one_higher)
        if bool((above < 0).all()):
            break
    return visible


def depths(parents: Tensor) -> Tensor:
    """Edges between each node and the anchor: [rows, nodes] -> [rows, nodes] int64."""
    return ancestors(parents).sum(-1) - 1


def independent(
    anchor: int, tokens: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]
) -> list[Laws]:
    """The laws of depths that do not see each other.

    Whatever token came before, a depth's law is the same.
    tokens, scores: of each depth, the likeliest tokens and their log-probabilities, descending.
    """
    laws: list[Laws] = []
    before: Sequence[int] = [anchor]
    for own_tokens, own_scores in zip(tokens, scores, strict=True):
        law = (own_tokens, own_scores)
        laws.append(dict.fromkeys(before, law))
        before = own_tokens
    return laws


class _Path(NamedTuple):
    """A path that could be taken next, as the heap sorts it.

    The likeliest one comes first, the shallower one among equals.
    """

    cost: float  # its negative log-probability
    depth: int  # of its last node, from 0 for the first one behind the anchor
    rank: int  # of its last token within its law
    parent: int  # node index
    law: Law


def best_first(anchor: int, laws: Sequence[Laws], count: int) -> Nodes:
    """The `count` nodes behind the anchor whose paths are the likeliest, likeliest first.

    laws: of each depth from 1 on; behind a token that they do not know nothing grows. A prefix of
    the result is the best smaller tree; with one token a law it is a chain.
    """
    nodes = Nodes([], [], [])
    first = laws[0][anchor]
    heap = [_Path(-first[1][0], 0, 0, 0, first)]
    while heap and len(nodes.tokens) < count:
        cost, depth, rank, parent, law = heappop(heap)
        tokens, scores = law
        nodes.tokens.append(tokens[rank])
        nodes.parents.append(parent)
        nodes.scores.append(scores[rank])

        has_sibling = rank + 1 < len(tokens)
        if has_sibling:
            sibling_cost = cost + scores[rank] - scores[rank + 1]
            heappush(heap, _Path(sibling_cost, depth, rank + 1, parent, law))

        is_last_depth = depth + 1 == len(laws)
        below = None if is_last_depth else laws[depth + 1].get(tokens[rank])
        if below:
            node = len(nodes.tokens)
            heappush(heap, _Path(cost - below[1][0], depth + 1, 0, node, below))
    return nodes


def alone(anchors: Sequence[int]) -> Proposal:
    """Nothing behind the anchors: plain decoding."""
    tokens = torch.tensor(anchors, **INTS)[:, None]
    return Proposal(tokens, torch.full_like(tokens, -1), torch.ones(len(tokens), **INTS))


def planted(anchors: Sequence[int], grown: Sequence[Nodes]) -> Proposal:
    """One proposal of chosen nodes from what grew behind every anchor; padding is a chain."""
    sizes = [1 + len(nodes.tokens) for nodes in grown]
    width = max(sizes)
    padded_tokens = []
    padded_parents = []
    padded_scores = []
    for anchor, nodes, size in zip(anchors, grown, sizes, strict=True):
        padding = width - size
        padded_tokens.append([anchor, *nodes.tokens, *[0] * padding])
        padded_parents.append([-1, *nodes.parents, *range(size - 1, width - 1)])
        padded_scores.append([0.0, *nodes.scores, *[0.0] * padding])
    return Proposal(
        tokens=torch.tensor(padded_tokens, **INTS),
        parents=torch.tensor(padded_parents, **INTS),
        sizes=torch.tensor(sizes, **INTS),
        scores=torch.tensor(padded_scores, **FLOATS),
    )


def spread(proposal: Proposal, places: Sequence[int], anchors: Sequence[int]) -> Proposal:
    """The same for more rows: those at `places` have what was proposed, the others their anchors.

    anchors: of all rows.
    """
    if len(places) == len(anchors):
        return proposal

    num_rows = len(anchors)
    width = proposal.num_nodes
    tokens = torch.zeros(num_rows, width, **INTS)
    tokens[:, 0] = torch.tensor(anchors, **INTS)
    tokens[places] = proposal.tokens
    parents = chain(width).repeat(num_rows, 1)
    parents[places] = proposal.parents
    sizes = torch.ones(num_rows, **INTS)
    sizes[places] = proposal.sizes
    return Proposal(
        tokens=tokens,
        parents=parents,
        sizes=sizes,
        scores=_placed(proposal.scores, places, num_rows),
        probs=_placed(proposal.probs, places, num_rows),
        drawn=_placed(proposal.drawn, places, num_rows),
    )


def _placed(values: Tensor | None, places: Sequence[int], num_rows: int) -> Tensor | None:
    """Zeros in all rows but those at `places`."""
    if values is None:
        return None
    placed = values.new_zeros(num_rows, *values.shape[1:])
    placed[places] = values
    return placed


def check(proposal: Proposal) -> None:
    """AssertionError unless the proposal keeps the promises that `verify` and the engine rely on.

    Shapes; sizes from 1 to nodes; parents before children, padding included; siblings with
    different tokens; drawn nodes with the law they were drawn from, which must give their token
    some mass. What it can't see: that siblings were drawn without replacement, and that none was
    dropped for its own token's sake.
    """
    _check_shapes(proposal)
    num_nodes = proposal.num_nodes
    sizes = proposal.sizes.tolist()
    rows = zip(proposal.tokens.tolist(), proposal.parents.tolist(), sizes, strict=True)
    for tokens, parents, size in rows:
        assert 1 <= size <= num_nodes, f"sizes {sizes} outside 1..{num_nodes}"
        assert parents[0] == -1, "node 0 is not a root"
        for node, parent in enumerate(parents):
            assert -1 <= parent < node, "a parent that does not precede its child"
        assert -1 not in parents[1:size], "a second root"
        children = set(zip(parents[1:size], tokens[1:size], strict=True))
        assert len(children) == size - 1, "siblings with the same token"
    if proposal.drawn is not None:
        _check_drawn(proposal, proposal.drawn)


def _check_shapes(proposal: Proposal) -> None:
    shape = tuple(proposal.tokens.shape)
    parents, sizes = tuple(proposal.parents.shape), tuple(proposal.sizes.shape)
    assert parents == shape, f"parents {parents} do not fit tokens {shape}"
    assert sizes == shape[:1], f"sizes {sizes} for {shape[0]} rows"
    for name, values in (("scores", proposal.scores), ("drawn", proposal.drawn)):
        fits = values is None or tuple(values.shape) == shape
        assert fits, f"{name} do not fit tokens {shape}"


def _check_drawn(proposal: Proposal, drawn: Tensor) -> None:
    tokens, parents = proposal.tokens, proposal.parents
    nodes = torch.arange(proposal.num_nodes, dtype=torch.int64, device=tokens.device)
    is_real = nodes < proposal.sizes[:, None]
    row, node = (drawn & is_real).nonzero(as_tuple=True)
    if not len(row):
        return

    assert proposal.probs is not None, "drawn nodes without their law"
    fits = proposal.probs.shape[:2] == tokens.shape
    assert fits, f"probs do not fit tokens {tuple(tokens.shape)}"
    assert not bool(drawn[:, 0].any()), "the anchor is not drawn"
    mass = proposal.probs[row, parents[row, node], tokens[row, node]]
    assert bool((mass > 0).all()), "a drawn token to which its law gives no mass"
