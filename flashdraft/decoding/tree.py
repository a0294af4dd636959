"""Shapes of proposals, as functions of `parents`.

Knows node indices only. Does not know what their tokens mean, who proposed them, or what the target thinks of them.
`parents` is [rows, nodes] int64: -1 at the anchor (node 0), otherwise a smaller index; a chain is -1, 0, 1, 2, ...
"""

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

import torch
from torch import Tensor

from flashdraft.process import FLOATS, INTS
from flashdraft.types import Proposal

__all__ = [
    "NOTHING",
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
]


Nodes = tuple[
    list[int], list[int], list[float]
]  # behind the anchor: tokens, parents, log-confidence given the parent
Laws = Mapping[
    int, tuple[Sequence[int], Sequence[float]]
]  # one depth's: token before -> tokens, log-probabilities, descending
NOTHING: Nodes = ([], [], [])


def chain(num_nodes: int) -> Tensor:
    """Parents of a chain of `num_nodes`, the anchor included: [nodes] int64."""
    return torch.arange(-1, num_nodes - 1, **INTS)


def ancestors(parents: Tensor) -> Tensor:
    """What a node sees, itself and its ancestors: [rows, nodes] -> bool [rows, nodes, nodes]; at [r, i, j]: i sees j."""
    nodes = torch.arange(parents.shape[1], dtype=torch.int64, device=parents.device)
    if bool((parents == nodes - 1).all()):  # chains; a prompt is one
        return (nodes[:, None] >= nodes).expand(len(parents), -1, -1)
    visible = torch.zeros(*parents.shape, len(nodes), dtype=torch.bool, device=parents.device)
    above = nodes.expand_as(parents)
    for _ in nodes:  # never more climbs than nodes, even if `parents` were wrong
        visible |= above[:, :, None] == nodes
        above = torch.where(above < 0, above, parents.gather(1, above.clamp(min=0)))
        if bool((above < 0).all()):
            break
    return visible


def depths(parents: Tensor) -> Tensor:
    """Edges between each node and the anchor: [rows, nodes] -> [rows, nodes] int64."""
    return ancestors(parents).sum(-1) - 1


def independent(
    anchor: int, tokens: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]
) -> list[Laws]:
    """The laws of depths that do not see each other, from each depth's tokens and log-probabilities."""
    return [
        dict.fromkeys(before, own)
        for before, own in zip(
            [[anchor], *tokens[:-1]], zip(tokens, scores, strict=True), strict=True
        )
    ]


def best_first(anchor: int, laws: Sequence[Laws], count: int) -> Nodes:
    """The `count` nodes behind the anchor with the likeliest paths: their tokens, parents and own scores, likeliest first.

    laws: of each depth from 1 on; behind a token that they do not know nothing grows. A prefix of the result is the best smaller
    tree; with one token a law it is a chain.
    """
    first, nodes = laws[0][anchor], list[tuple[int, int, float]]()
    heap = [(-first[1][0], 0, 0, 0, first)]  # of a path: -log-probability, depth, rank, parent, law
    while heap and len(nodes) < count:
        cost, depth, rank, parent, (tokens, scores) = heappop(heap)
        nodes.append((tokens[rank], parent, scores[rank]))
        if rank + 1 < len(tokens):
            heappush(
                heap,
                (cost + scores[rank] - scores[rank + 1], depth, rank + 1, parent, (tokens, scores)),
            )
        if depth + 1 < len(laws) and (below := laws[depth + 1].get(tokens[rank])):
            heappush(heap, (cost - below[1][0], depth + 1, 0, len(nodes), below))
    return [node[0] for node in nodes], [node[1] for node in nodes], [node[2] for node in nodes]


def alone(anchors: Sequence[int]) -> Proposal:
    """Nothing behind the anchors: plain decoding."""
    tokens = torch.tensor(anchors, **INTS)[:, None]
    return Proposal(tokens, torch.full_like(tokens, -1), torch.ones(len(tokens), **INTS))


def planted(anchors: Sequence[int], grown: Sequence[Nodes]) -> Proposal:
    """One proposal of chosen nodes from what was grown behind every anchor."""
    rows = [
        ([a, *own], [-1, *above], [0.0, *scores])
        for a, (own, above, scores) in zip(anchors, grown, strict=True)
    ]
    width = max(len(own) for own, _, _ in rows)
    above = [*range(-1, width - 1)]
    tokens = torch.tensor([own + [0] * (width - len(own)) for own, _, _ in rows], **INTS)
    parents = torch.tensor([own + above[len(own) :] for _, own, _ in rows], **INTS)
    scores = torch.tensor([own + [0.0] * (width - len(own)) for _, _, own in rows], **FLOATS)
    sizes = torch.tensor([len(own) for own, _, _ in rows], **INTS)
    return Proposal(tokens, parents, sizes, scores)


def check(proposal: Proposal) -> None:
    """AssertionError unless the proposal keeps the promises that `verify` and the engine rely on.

    Shapes; sizes from 1 to nodes; parents before children, padding included; siblings with different tokens; drawn nodes
    with the law they were drawn from, which must give their token some mass. What it can't see: that siblings were drawn
    without replacement, and that none was dropped for its own token's sake.
    """
    tokens, parents, sizes = proposal.tokens, proposal.parents, proposal.sizes
    num_rows, num_nodes = tokens.shape
    assert parents.shape == tokens.shape, (
        f"parents {tuple(parents.shape)} do not fit tokens {tuple(tokens.shape)}"
    )
    assert sizes.shape == (num_rows,), f"sizes {tuple(sizes.shape)} for {num_rows} rows"
    for own, above, size in zip(tokens.tolist(), parents.tolist(), sizes.tolist(), strict=True):
        assert 1 <= size <= num_nodes, f"sizes {sizes.tolist()} outside 1..{num_nodes}"
        assert above[0] == -1, "node 0 is not a root"
        assert all(-1 <= parent < node for node, parent in enumerate(above)), (
            "a parent that does not precede its child"
        )
        assert -1 not in above[1:size], "a second root"
        assert len(set(zip(above[1:size], own[1:size], strict=True))) == size - 1, (
            "siblings with the same token"
        )
    for name, values in (("scores", proposal.scores), ("drawn", proposal.drawn)):
        assert values is None or values.shape == tokens.shape, (
            f"{name} do not fit tokens {tuple(tokens.shape)}"
        )
    if proposal.drawn is None:
        return
    real = torch.arange(num_nodes, dtype=torch.int64, device=tokens.device) < sizes[:, None]
    row, node = (proposal.drawn & real).nonzero(as_tuple=True)
    if not len(row):
        return
    assert proposal.probs is not None, "drawn nodes without their law"
    assert proposal.probs.shape[:2] == tokens.shape, (
        f"probs do not fit tokens {tuple(tokens.shape)}"
    )
    assert not bool(proposal.drawn[:, 0].any()), "the anchor is not drawn"
    mass = proposal.probs[row, parents[row, node], tokens[row, node]]
    assert bool((mass > 0).all()), "a drawn token to which its law gives no mass"
