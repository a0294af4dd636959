"""Plain decoding: the drafter that proposes nothing. Every proposal is the anchor alone."""

import torch

from flashdraft.types import Drafter, Proposal, Rows

__all__ = ["Autoregressive"]


class Autoregressive(Drafter):
    name = "autoregressive"

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        tokens = torch.tensor(rows.anchors)[:, None]
        return Proposal(tokens, torch.full_like(tokens, -1), torch.ones(len(rows), dtype=torch.long))
