"""How many nodes of a proposal the target should read: as many as pay for their time, down to none.

Knows scores, sizes and seconds. Does not know methods, models or tokens. Over the whole batch, nodes are taken in the order
of their paths' confidence as long as that brings more committed tokens a second (the idea of D-Cut). A drawn node's score is
fixed before its own token is drawn, so that trimming changes no law; chosen nodes may go for any reason.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashdraft.types import Proposal

__all__ = ["Control"]

_MEMORY = 0.98  # what a calibration keeps of its past at every observation
_SMOOTH = 0.8  # the same for drafting's times and gains
_WORTH = 1.05  # what drafting must promise, to plain decoding: the best of many promises is kept a little less than in full
_FIRST = 2  # plain steps before the first drafts: what those are compared with
_PAUSES = (4, 8, 16, 32, 64)  # steps without drafts after each vain try
_LOOK = 16  # drafted steps until a plain one shows what it takes by now, where they hardly pay; more where they do
_DRIFT, _NOISE = (4e-4, 1e-5), 1e-2  # variances, a step: how `always` and `more` move, and of what is seen of them


class _Batch:
    """What is known of steps of about as many rows: 1, 2 or 3, 4 to 7, and so on."""

    def __init__(self) -> None:
        self.draft = 0.0  # seconds of drafting in a step
        self.always = self.more = 0.0  # of all steps, and of drafted ones more: see `learn`
        self.doubt = 0.1, 0.0, 0.1  # their variances, and covariance in between
        self.pause, self.vain, self.gain = _FIRST, 0, 0.0  # the last: what drafting promised of late, to plain decoding
        self.since = 0  # drafted steps since the last plain one

    def observe(self, beyond: float, drafted: bool) -> None:
        """One step's time beyond the table: a Kalman filter's update."""
        (own, both, other), error = self.doubt, beyond - self.always - drafted * self.more
        own, other = own + _DRIFT[0], other + _DRIFT[1]
        first, second = own + drafted * both, both + drafted * other
        scale = 1 / (first + drafted * second + _NOISE)
        self.always, self.more = self.always + scale * first * error, self.more + scale * second * error
        self.doubt = own - scale * first**2, both - scale * first * second, other - scale * second**2


class Control:
    """One for a target with its drafter: what it has learned from one text serves the next.

    seconds: of a target's step of one row, by its number of tokens (two or more entries).
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._known = sorted(seconds.items())
        self._sums: dict[int, list[float]] = {}  # by depth: nodes accepted and hoped for behind accepted parents, faded
        self._batches: dict[int, _Batch] = defaultdict(_Batch)  # by the bits of the number of rows

    def begin(self) -> None:
        """A text begins that is alone: what others accepted says little of it, and more of a batch, in which texts mix."""
        for sums in self._sums.values():
            sums[:] = 2 * sums[0] / max(sums[1], 1e-9), 2.0
        for bits, batch in self._batches.items():
            most = min(1 + bits, len(_PAUSES) - 1)
            batch.vain, batch.pause, batch.gain = min(batch.vain, most), min(batch.pause, _PAUSES[most]), 0.0

    def wants_drafts(self, rows: int) -> bool:
        """Whether the next step of so many rows should draft at all."""
        return self._batches[rows.bit_length()].pause <= 0

    def trim(self, proposal: Proposal) -> Tensor:
        """How many nodes of each row pay: [rows], 1 or more and no more than there are."""
        confidence, sizes = self._confidence(proposal), proposal.sizes.tolist()
        order = sorted(
            ((confidence[row][node], row) for row, size in enumerate(sizes) for node in range(1, size)), key=lambda pair: -pair[0]
        )
        rows = len(sizes)
        batch = self._batches[rows.bit_length()]
        step = self.cost(rows)
        plain, spent = rows / (step * (1 + batch.always)), batch.draft + step * (batch.always + batch.more)
        best, kept, hope = rows / (step + spent), 0, float(rows)
        for count, (chance, _) in enumerate(order, 1):
            hope += chance
            if (rate := hope / (self.cost(rows + count) + spent)) > best:
                best, kept = rate, count
            elif proposal.drawn is not None:  # what comes behind a drawn node may not speak for it: it has seen its token
                break
        if order:
            past = _SMOOTH**rows if batch.gain else 0.0  # one row's poor proposal says little of the next one
            batch.gain = past * batch.gain + (1 - past) * best / plain
        if batch.gain < _WORTH:
            batch.pause = _PAUSES[min(batch.vain, len(_PAUSES) - 1)]
            batch.vain += 1
        else:
            batch.vain = 0
        trimmed = [1] * rows
        for _, row in order[:kept]:
            trimmed[row] += 1
        return torch.tensor(trimmed)

    def learn(self, proposal: Proposal, paths: Sequence[Sequence[int]], draft_seconds: float | None, seconds: float) -> None:
        """What became of a proposal that `trim` gave: seconds of the whole step; of propose and observe, None without drafts.

        What steps take beyond the table, in steps of the table: a share of all of them (a longer context, a machine that slows
        down) and one of drafted ones (several rows' caches). No time counts for more than twice what
        is usual: a step may be held up.
        """
        rows = len(paths)
        batch = self._batches[rows.bit_length()]
        beyond = (seconds - (draft_seconds or 0.0) - self.cost(int(proposal.sizes.sum()))) / self.cost(rows)
        batch.observe(min(max(beyond, -0.8), 1.0), draft_seconds is not None)
        if draft_seconds is None:
            batch.pause, batch.since = batch.pause - 1, 0
            return
        usual = batch.draft or draft_seconds
        batch.draft, batch.since = _SMOOTH * usual + (1 - _SMOOTH) * min(draft_seconds, 2 * usual), batch.since + 1
        if batch.since >= _LOOK * max(batch.gain, 1.0) ** 3:
            batch.pause = max(batch.pause, 1)
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
