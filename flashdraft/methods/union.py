"""Two drafters at once: their proposals become one tree, in which equal prefixes are one path.

Only chosen nodes are joined. Where a drawn node stands in a merged tree, and so whether it is read, would depend on its own
token, which changes the law: drawn proposals are refused. Knows no method by name.
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
_UNKNOWN = -0.7  # log-confidence, about a half, of a node whose drafter states none: behind sure nodes, before unlikely ones


class Union(Drafter):
    """`first` and `second` propose; the best paths of both are read. Each sees the features of the layers that it asked for."""

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.drafters = first, second
        for drafter in self.drafters:
            if isinstance(getattr(drafter, "drawn", None), bool):
                drafter.drawn = False  # type: ignore[attr-defined]  # see above
        self.name = f"{first.name}+{second.name}"
        self.layers = tuple(dict.fromkeys((*first.layers, *second.layers)))
        self.caches = (*first.caches, *second.caches)

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        """The likeliest paths of both, likeliest first; the controller calibrates stated and unknown confidences alike."""
        trees = [_nodes(drafter.propose(rows, max_nodes)) for drafter in self.drafters]
        return planted(
            rows.anchors, [merge(pair, max_nodes - 1) for pair in zip(*trees, strict=True)]
        )

    def observe(
        self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None
    ) -> None:
        for drafter in self.drafters:
            columns = [self.layers.index(layer) for layer in drafter.layers]
            own = [
                f.unflatten(1, (len(self.layers), -1))[:, columns].flatten(1)
                for f in features or ()
            ]
            drafter.observe(rows, tokens, own if columns else None)

    def end(self, rows: Rows) -> None:
        for drafter in self.drafters:
            drafter.end(rows)


def merge(trees: Sequence[Nodes], count: int) -> Nodes:
    """One tree of the `count` nodes with the likeliest paths, likeliest first; a node of several trees has its best score."""
    scores = dict[Path, float]()  # parents before children
    total: dict[Path, float] = {(): 0.0}
    for tokens, parents, own in trees:
        paths: list[Path] = [()]
        for token, parent, score in zip(tokens, parents, own, strict=True):
            paths.append((*paths[parent], token))
            scores[paths[-1]] = max(score, scores.get(paths[-1], score))
    for path, score in scores.items():
        total[path] = total[path[:-1]] + min(
            score, 0.0
        )  # rounding may leave a certain node above 0
    order = sorted(scores, key=lambda path: -total[path])[
        :count
    ]  # stable: parents stay before their children
    places = {path: node for node, path in enumerate([(), *order])}
    return Nodes(
        [path[-1] for path in order],
        [places[path[:-1]] for path in order],
        [scores[path] for path in order],
    )


def _nodes(proposal: Proposal) -> list[Nodes]:
    """By row: what lies behind the anchor."""
    if proposal.drawn is not None and bool(proposal.drawn.any()):
        raise InvalidParameter(
            "drawn drafts cannot be joined", hint="make the drafter with drawn=False"
        )
    scores = (
        torch.full(proposal.tokens.shape, _UNKNOWN, **FLOATS)
        if proposal.scores is None
        else proposal.scores
    )
    lists = (t.tolist() for t in (proposal.tokens, proposal.parents, scores, proposal.sizes))
    return [
        Nodes(own[1:size], parents[1:size], sure[1:size])
        for own, parents, sure, size in zip(*lists, strict=True)
    ]
