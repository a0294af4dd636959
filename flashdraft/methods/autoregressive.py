"""Plain decoding: the drafter that proposes nothing. Every proposal is the anchor alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashdraft.cache import SlotCache
from flashdraft.types import Proposal, Rows

__all__ = ["Autoregressive"]


class Autoregressive:
    name = "autoregressive"
    layers: tuple[int, ...] = ()
    caches: tuple[SlotCache, ...] = ()

    def propose(self, rows: Rows, max_nodes: int) -> Proposal:
        tokens = torch.tensor(rows.anchors)[:, None]
        return Proposal(tokens, torch.full_like(tokens, -1), torch.ones(len(rows), dtype=torch.long))

    def observe(self, rows: Rows, tokens: Sequence[Tensor], features: Sequence[Tensor] | None) -> None:
        pass

    def end(self, rows: Rows) -> None:
        pass
