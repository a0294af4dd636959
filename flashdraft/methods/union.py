"""Two drafters at once: their proposals become one tree, in which equal prefixes are one path.

Only chosen nodes are joined. Where a drawn node stands in a merged tree, and so whether it is read,
would depend on its own token, which changes the law: drawn proposals are refused. Knows no method
by name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashdraft.decoding.tree import Nodes, planted
from flashdraft.errors import InvalidParameter
from flashdraft.process import FLOATS
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Union", "merge"]

Path = tuple[int, ...]  # the tokens from the anchor to a node

# Log-confidence of a node whose drafter states none: about a half, behind sure nodes and before
# unlikely ones.
_UNKNOWN = -0.7


class Union(Drafter):
    """`first` and `second` propose; the best paths of both are read. Each sees the features of the
    layers that it asked for."""

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.drafters = (first, second)
        for drafter in self.drafters:
            if isinstance(getattr(drafter, "drawn", None), bool):
                drafter.drawn = False  # type: ignore[attr-defined]  # see above
        self.name = f"{first.name}+{second.name}"
        self.layers = tuple(dict.fromkeys((*first.layers, *second.layers)))
        self.caches = (*first.caches, *second.caches)
        self.is_free = _is_free(first) and _is_free(second)
        self.free_part = None if self.is_free else _free_part(first, second)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """The likeliest paths of both, likeliest first; the controller calibrates stated and
        unknown confidences alike."""
        first, second = self.drafters
        first_trees = _nodes(first.propose(rows, max_nodes))
        second_trees = _nodes(second.propose(rows, max_nodes))
        merged = []
        for pair in zip(first_trees, second_trees, strict=True):
            merged.append(merge(pair, max_nodes - 1))
        return planted(rows.anchors, merged)

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        for drafter in self.drafters:
            if not drafter.layers:
                drafter.observe(rows, tokens, None)
                continue

            assert features is not None
            columns = [self.layers.index(layer) for layer in drafter.layers]
            own = []
            for everything in features:
                by_layer = everything.unflatten(1, (len(self.layers), -1))
                own.append(by_layer[:, columns].flatten(1))
            drafter.observe(rows, tokens, own)

    def resume(self, source: int, slot: int, count: int) -> int:
        """As much as both can take over."""
        first, second = self.drafters
        by_first = first.resume(source, slot, count)
        by_both = second.resume(source, slot, by_first)
        if by_both < by_first:
            first.resume(slot, slot, by_both)
        return by_both

    def end(self, rows: Rows) -> None:
        for drafter in self.drafters:
            drafter.end(rows)


def merge(trees: Sequence[Nodes], count: int) -> Nodes:
    """One tree of the `count` nodes with the likeliest paths, likeliest first; a node of several
    trees has its best score."""
    scores: dict[Path, float] = {}  # parents before children
    for tokens, parents, own in trees:
        paths: list[Path] = [()]
        for token, parent, score in zip(tokens, parents, own, strict=True):
            path = (*paths[parent], token)
            paths.append(path)
            scores[path] = max(score, scores.get(path, score))

    total: dict[Path, float] = {(): 0.0}  # log-confidence of whole paths
    for path, score in scores.items():
        certain_at_most = min(score, 0.0)  # rounding may leave a certain node above 0
        total[path] = total[path[:-1]] + certain_at_most

    order = sorted(scores, key=lambda path: -total[path])  # stable: parents before their children
    places: dict[Path, int] = {(): 0}
    merged = Nodes([], [], [])
    for place, path in enumerate(order[:count], 1):
        places[path] = place
        merged.tokens.append(path[-1])
        merged.parents.append(places[path[:-1]])
        merged.scores.append(scores[path])
    return merged


def _is_free(drafter: Drafter) -> bool:
    """A drafter that does not inherit from `Drafter` says nothing, and may take time."""
    return getattr(drafter, "is_free", False)


def _free_part(first: Drafter, second: Drafter) -> Drafter | None:
    for drafter in (first, second):
        if _is_free(drafter):
            return drafter
    for drafter in (first, second):
        part: Drafter | None = getattr(drafter, "free_part", None)
        if part is not None:
            return part
    return None


def _nodes(proposal: Proposal) -> list[Nodes]:
    """By row: what lies behind the anchor."""
    if proposal.drawn is not None and bool(proposal.drawn.any()):
        hint = "make the drafter with drawn=False"
        raise InvalidParameter("drawn drafts cannot be joined", hint=hint)

    confidence = proposal.scores
    if confidence is None:
        confidence = torch.full(proposal.tokens.shape, _UNKNOWN, **FLOATS)
    tokens = proposal.tokens.tolist()
    parents = proposal.parents.tolist()
    scores = confidence.tolist()
    rows = []
    for row, size in enumerate(proposal.sizes.tolist()):
        behind = slice(1, size)
        rows.append(Nodes(tokens[row][behind], parents[row][behind], scores[row][behind]))
    return rows
