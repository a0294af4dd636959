"""How many nodes of a proposal the target should read: as many as pay for their time, down to none.

Knows scores, sizes and seconds. Does not know methods, models or tokens. Over the whole batch, nodes are taken in the order
of their paths' confidence as long as that brings more committed tokens a second (the idea of D-Cut). A drawn node's score is
fixed before its own token is drawn, so that trimming changes no law; chosen nodes may go for any reason.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashdraft.types import Proposal

__all__ = ["Control"]

_MEMORY = 0.98  # what a calibration keeps of its past at every observation
_SMOOTH = 0.8  # the same for times and gains
_BATCH = 1.25  # what drafting must promise in a batch: the table is one row's, and several rows' caches cost more
_PAUSES = (4, 8, 16, 32, 64)  # steps without drafts after each vain try


class Control:
    """`seconds`: of a target's step, by its number of tokens (two or more entries)."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._known = sorted(seconds.items())
        self._sums: dict[int, list[float]] = {}  # by depth: nodes accepted and hoped for behind accepted parents, faded
        self._draft = 0.0  # seconds of drafting in a step
        self._rest: dict[bool, float] = {}  # of steps without and with drafts: seconds beyond drafting and the target's own
        self._pause, self._vain, self._gain = 0, 0, 0.0  # the last: what drafting promised of late, to plain decoding

    def wants_drafts(self) -> bool:
        """Whether this step should draft at all; asked once a step."""
        self._pause -= 1
        return self._pause < 0

    def trim(self, proposal: Proposal) -> Tensor:
        """How many nodes of each row pay: [rows], 1 or more and no more than there are."""
        confidence, sizes = self._confidence(proposal), proposal.sizes.tolist()
        order = sorted(
            ((confidence[row][node], row) for row, size in enumerate(sizes) for node in range(1, size)), key=lambda pair: -pair[0]
        )
        rows = len(sizes)
        rest = self._rest.get(True, 0.0)
        plain, spent = rows / (self.cost(rows) + self._rest.get(False, rest)), self._draft + rest
        best, kept, hope = rows / (self.cost(rows) + spent), 0, float(rows)
        for count, (chance, _) in enumerate(order, 1):
            hope += chance
            if (rate := hope / (self.cost(rows + count) + spent)) > best:
                best, kept = rate, count
            elif proposal.drawn is not None:  # what comes behind a drawn node may not speak for it: it has seen its token
                break
        if order:
            faded = _SMOOTH * (self._gain or 1.0) + (1 - _SMOOTH) * best / plain
            self._gain = faded if self._gain else max(faded, best / plain)  # a first promise is all that is known
        if self._gain < (1 if rows == 1 else _BATCH):  # one poor proposal says little of the next
            self._pause = _PAUSES[min(self._vain, len(_PAUSES) - 1)]
            self._vain += 1
        else:
            self._vain = 0
        trimmed = [1] * rows
        for _, row in order[:kept]:
            trimmed[row] += 1
        return torch.tensor(trimmed)

    def learn(self, proposal: Proposal, paths: Sequence[Sequence[int]], draft_seconds: float | None, seconds: float) -> None:
        """What became of a proposal that `trim` gave: seconds of the whole step; of propose and observe, None without drafts."""
        target, drafted = self.cost(int(proposal.sizes.sum())), draft_seconds is not None
        if draft_seconds is not None:
            self._draft = draft_seconds if self._draft == 0 else _SMOOTH * self._draft + (1 - _SMOOTH) * draft_seconds
        rest = min(max(seconds - target - (draft_seconds or 0.0), 0.0), target)  # a step that was held up says nothing
        self._rest[drafted] = _SMOOTH * self._rest.get(drafted, rest) + (1 - _SMOOTH) * rest
        shape = proposal.parents.tolist(), proposal.sizes.tolist()
        for path, own, parents, size in zip(paths, _scores(proposal), *shape, strict=True):
            depths = {node: depth for depth, node in enumerate(path)}
            for node in range(1, size):
                if (depth := depths.get(parents[node])) is not None:
                    sums = self._sums.setdefault(depth, [2.0, 2.0])
                    sums[0] = _MEMORY * sums[0] + (node in depths)
                    sums[1] = _MEMORY * sums[1] + own[node]

    def cost(self, tokens: int) -> float:
        """Seconds of a step of so many tokens, on the line through the two known numbers around it or the last two."""
        above = next((i for i, (count, _) in enumerate(self._known) if count >= tokens), len(self._known) - 1)
        (low, first), (high, second) = self._known[max(above, 1) - 1], self._known[max(above, 1)]
        return first + (second - first) * (tokens - low) / (high - low)

    def _confidence(self, proposal: Proposal) -> list[list[float]]:
        """By row and node: the chance that the whole path to it is accepted, calibrated by what was accepted so far."""
        parents = proposal.parents.tolist()
        chances = []
        for own, above in zip(_scores(proposal), parents, strict=True):
            path, depths = [1.0], [0]
            for node in range(1, proposal.num_nodes):
                accepted, hoped = self._sums.get(depths[above[node]], (1.0, 1.0))
                depths.append(depths[above[node]] + 1)
                path.append(path[above[node]] * min(own[node] * accepted / max(hoped, 1e-9), 1.0))
            chances.append(path)
        return chances


def _scores(proposal: Proposal) -> list[list[float]]:
    """By row and node: the drafter's confidence in it, given its parent; 1 from a drafter that states none."""
    if proposal.scores is None:
        return [[1.0] * proposal.num_nodes] * len(proposal.tokens)
    return proposal.scores.exp().tolist()
