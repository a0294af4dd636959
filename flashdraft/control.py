"""How many nodes of a proposal the target should read: as many as pay for their time, down to none.

Knows scores, sizes and seconds. Does not know methods, models or tokens. Over the whole batch, nodes are taken in the order
of their paths' confidence as long as that brings more committed tokens a second (the idea of D-Cut). A drawn node's score is
fixed before its own token is drawn, so that trimming changes no law; chosen nodes may go for any reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashdraft.types import Proposal

__all__ = ["Control"]

_MEMORY = 0.98  # what a calibration keeps of its past at every observation
_SMOOTH = 0.8  # the same for times and gains
_SLOW = 0.95  # for what drafting brought: how many drafts are accepted varies widely
_PAUSES = (4, 8, 16, 32, 64)  # steps without drafts after each vain try


class Control:
    """`seconds`: of a target's step, by its number of tokens (two or more entries)."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._known = dict(seconds)  # what was measured before, and what steps take since
        self._sums: dict[int, list[float]] = {}  # by depth: nodes accepted and hoped for behind accepted parents, faded
        self._draft = 0.0  # seconds of drafting in a step
        self._rest: dict[bool, float] = {}  # of steps without and with drafts: seconds beyond drafting and the target's own
        self._pause, self._vain, self._plain = 0, 0, 1 / self.cost(1)  # the last: tokens a second without drafts
        self._gain, self._real = 1.0, 1.25  # to that, of late: what drafting promised, and what it brought

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
        self._plain, spent = rows / (self.cost(rows) + self._rest.get(False, rest)), self._draft + rest
        best, kept, hope = rows / (self.cost(rows) + spent), 0, float(rows)
        for count, (chance, _) in enumerate(order, 1):
            hope += chance
            if (rate := hope / (self.cost(rows + count) + spent)) > best:
                best, kept = rate, count
        self._gain = _faded(self._gain, best / self._plain) if order else self._gain
        if min(self._gain, self._real) < 1:  # one poor proposal says little of the next
            self._pause = _PAUSES[min(self._vain, len(_PAUSES) - 1)]
            self._vain += 1
        else:
            self._vain = 0
        counts = Counter(row for _, row in order[:kept])
        return torch.tensor([1 + counts[row] for row in range(rows)])

    def learn(self, proposal: Proposal, paths: Sequence[Sequence[int]], parts: Mapping[str, float], *, drafted: bool) -> None:
        """What became of a proposal that `trim` gave; parts: seconds of the step by part, `target` and `draft` among them."""
        count, target, draft = int(proposal.sizes.sum()), parts["target"], parts["draft"] if drafted else 0.0
        known = self.cost(count)
        seconds = min(sum(parts.values()), 3 * (known + draft))
        self._real = _faded(self._real, sum(map(len, paths)) / seconds / self._plain, _SLOW) if drafted else self._real
        self._known[count] = _faded(known, min(target, 2 * known))  # a step that was held up says little
        self._draft = _faded(self._draft or draft, draft) if drafted else self._draft
        rest = min(max(seconds - target - draft, 0.0), known)
        self._rest[drafted] = _faded(self._rest.get(drafted, rest), rest)
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
        points = sorted(self._known.items())
        above = next((i for i, (count, _) in enumerate(points) if count >= tokens), len(points) - 1)
        (low, first), (high, second) = points[max(above, 1) - 1], points[max(above, 1)]
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


def _faded(old: float, new: float, keep: float = _SMOOTH) -> float:
    return keep * old + (1 - keep) * new


def _scores(proposal: Proposal) -> list[list[float]]:
    """By row and node: the drafter's confidence in it, given its parent; 1 from a drafter that states none."""
    if proposal.scores is None:
        return [[1.0] * proposal.num_nodes] * len(proposal.tokens)
    return proposal.scores.exp().tolist()
