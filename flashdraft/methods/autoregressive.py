"""Plain decoding: the drafter that proposes nothing. Every proposal is the anchor alone."""

from flashdraft.decoding.tree import alone
from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Autoregressive"]


class Autoregressive(Drafter):
    name = "autoregressive"

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        return alone(rows.anchors)

    def resume(self, source: int, slot: int, count: int) -> int:
        return count
