"""How many nodes of a proposal the target should read: as many as pay for their time, down to none.

Knows scores, sizes and seconds. Does not know methods, models or tokens. Over the whole batch, nodes are taken in the order
of their paths' confidence as long as that brings more committed tokens a second (the idea of D-Cut). A drawn node's score is
fixed before its own token is drawn, so that trimming changes no law; chosen nodes may go for any reason.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter, mul
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from flashdraft.process import INTS, new_lock
from flashdraft.types import Proposal

__all__ = ["Control"]

P = ParamSpec("P")
R = TypeVar("R")

_MEMORY = 0.98  # what a calibration keeps of its past at every observation
_SMOOTH = 0.8  # the same for drafting's times
_WORTH = 1.02  # what drafting might gain at least, to plain decoding, to be done
_FIRST = 2  # plain steps before the first drafts: what those are compared with
_LOOK = 16  # drafted steps until a plain one shows what it takes by now, where they hardly pay; more where they do
_NOISE = 1e-2  # variance of one step's time, in plain steps
_UNSURE = (
    0.1,
    0.1,
    0.003,
)  # variances of what steps take beyond the table (see `learn`), before any was seen
_DRIFT = (4e-4, 1e-5, 1e-6)  # and how they grow, a step
_GAIN, _GAIN_DRIFT, _POOR = (
    0.16,
    1e-4,
    0.7,
)  # the same of drafting's gain; no proposal counts for less than the last
_SPREAD, _LEAST, _FADE = (
    0.25,
    0.02,
    0.9,
)  # of single proposals around it: at first, at least, and what is kept of it


class _Batch:
    """What is known of steps of about as many rows: 1, 2 or 3, 4 to 7, and so on."""

    def __init__(self) -> None:
        self.draft = 0.0  # seconds of drafting in a step
        self.beyond = [0.0] * len(_UNSURE)  # see `learn`
        self.doubt = [
            [variance * (i == k) for k in range(len(_UNSURE))] for i, variance in enumerate(_UNSURE)
        ]
        self.since = (
            -_FIRST
        )  # drafted steps since the last plain one; below 0: plain ones that come first
        self.gain, self.unsure, self.spread = (
            1.0,
            _GAIN,
            _SPREAD,
        )  # tokens a second, to plain decoding: mean and variances

    def took(self, beyond: float, *known: float) -> None:
        """One step's time beyond the table: a Kalman filter's update."""
        for k, drift in enumerate(_DRIFT):
            self.doubt[k][k] += drift
        moves = [sum(map(mul, row, known)) for row in self.doubt]
        scale = 1 / (sum(map(mul, moves, known)) + _NOISE)
        error = beyond - sum(map(mul, self.beyond, known))
        self.beyond = [
            old + scale * move * error for old, move in zip(self.beyond, moves, strict=True)
        ]
        for row, move in zip(self.doubt, moves, strict=True):
            row[:] = [old - scale * move * other for old, other in zip(row, moves, strict=True)]

    def promised(self, gain: float, share: float) -> None:
        """One proposal's gain, for a step that takes `share` of a plain one's time: the same with one number."""
        gain = max(
            gain, _POOR
        )  # a first draft may take seconds: it must not look hopeless for ever
        self.spread = max(_FADE * self.spread + (1 - _FADE) * (gain - self.gain) ** 2, _LEAST)
        weight = self.unsure / (self.unsure + self.spread / share)
        self.gain += weight * (gain - self.gain)
        self.unsure *= 1 - weight


def _one_at_a_time(
    method: Callable[Concatenate[Control, P], R],
) -> Callable[Concatenate[Control, P], R]:
    @functools.wraps(method)
    def call(self: Control, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class Control:
    """One for a target with its drafter: what it has learned from one text serves the next.

    seconds: of a target's step of one row, by its number of tokens (two or more entries).
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._lock = new_lock()  # streams of several threads may share it
        self._known = sorted(seconds.items())
        # by depth: nodes accepted and hoped for behind accepted parents, faded
        self._sums: dict[int, list[float]] = defaultdict(lambda: [2.0, 2.0])
        self._batches: dict[int, _Batch] = defaultdict(_Batch)  # by the bits of the number of rows

    @_one_at_a_time
    def begin(self) -> None:
        """A text begins that is alone: what others accepted says little of it, and more of a batch, in which texts mix."""
        for sums in self._sums.values():
            sums[:] = 2 * sums[0] / max(sums[1], 1e-9), 2.0
        for bits, batch in self._batches.items():
            batch.unsure = max(batch.unsure, _GAIN / 2 ** (bits - 1))

    @_one_at_a_time
    def wants_drafts(self, rows: int) -> bool:
        """Whether the next step of so many rows should draft at all: it may well gain something, for all that is known.

        What is not tried grows less sure with every step, and is tried again: soon where little was lost, seldom where much was.
        """
        batch = self._batches[rows.bit_length()]
        return batch.since >= 0 and batch.gain + batch.unsure**0.5 > _WORTH

    @_one_at_a_time
    def trim(self, proposal: Proposal) -> Tensor:
        """How many nodes of each row pay: [rows], 1 or more and no more than there are."""
        confidence, sizes = self._confidence(proposal), proposal.sizes.tolist()
        chances = (
            (confidence[row][node], row)
            for row, size in enumerate(sizes)
            for node in range(1, size)
        )
        order, rows = sorted(chances, key=itemgetter(0), reverse=True), len(sizes)
        batch = self._batches[rows.bit_length()]
        step, (always, more, node) = self.cost(rows), batch.beyond
        plain, spent = step * (1 + always), batch.draft + step * (always + more)
        best, kept, share, hope = 0.0, 0, 1.0, 0.0
        for count, (chance, _) in enumerate([(float(rows), 0), *order]):
            hope += chance
            time = max(self.cost(rows + count) + spent + step * node * count / rows, plain)
            if (rate := hope / time) > best:
                best, kept, share = rate, count, time / plain
            elif (
                proposal.drawn is not None
            ):  # what comes behind a drawn node may not speak for it: it has seen its token
                break
        if order:
            batch.promised(best * plain / rows, share)
        more_of = Counter(row for _, row in order[:kept])
        return torch.tensor([1 + more_of[row] for row in range(rows)], **INTS)

    @_one_at_a_time
    def learn(
        self,
        proposal: Proposal,
        paths: Sequence[Sequence[int]],
        draft_seconds: float | None,
        seconds: float,
    ) -> None:
        """What became of a proposal that `trim` gave: seconds of the whole step; of propose and observe, None without drafts.

        Steps take more or less than the table says, in steps of the table: all of them (a longer context, a machine that slows
        down), drafted ones (several rows' caches) and each drafted node a row (a busy machine multiplies more slowly than it
        reads). No time counts for more than twice what is usual, the first draft's for no more than a step: one may be held up.
        """
        rows = len(paths)
        batch = self._batches[rows.bit_length()]
        nodes, drafted = int(proposal.sizes.sum()), draft_seconds is not None
        beyond = (seconds - (draft_seconds or 0.0) - self.cost(nodes)) / self.cost(rows)
        batch.took(min(max(beyond, -0.8), 1.0), 1.0, float(drafted), nodes / rows - 1)
        batch.unsure = min(batch.unsure + _GAIN_DRIFT, _GAIN)
        if draft_seconds is None:
            batch.since = min(batch.since + 1, 0)
            return
        usual = batch.draft or min(draft_seconds, self.cost(rows))
        batch.draft, batch.since = (
            _SMOOTH * usual + (1 - _SMOOTH) * min(draft_seconds, 2 * usual),
            batch.since + 1,
        )
        if batch.since >= _LOOK * max(batch.gain, 1.0) ** 3:
            batch.since = -1
        shape = proposal.parents.tolist(), proposal.sizes.tolist()
        for path, own, parents, size in zip(paths, _scores(proposal), *shape, strict=True):
            depths = {node: depth for depth, node in enumerate(path)}
            for node in range(1, size):
                if (depth := depths.get(parents[node])) is not None:
                    sums = self._sums[depth]
                    sums[0] = _MEMORY * sums[0] + (node in depths)
                    sums[1] = _MEMORY * sums[1] + own[node]

    def cost(self, tokens: int) -> float:
        """Seconds of a step of so many tokens, on the line through the two known numbers around it or the last two."""
        above = min(max(bisect_left(self._known, (tokens,)), 1), len(self._known) - 1)
        (low, first), (high, second) = self._known[above - 1 : above + 1]
        return first + (second - first) * (tokens - low) / (high - low)

    def _confidence(self, proposal: Proposal) -> list[list[float]]:
        """By row and node: the chance that the whole path to it is accepted, calibrated by what was accepted so far."""
        parents = proposal.parents.tolist()
        chances = []
        for own, above in zip(_scores(proposal), parents, strict=True):
            path, depths = [1.0], [0]
            for node in range(1, proposal.num_nodes):
                accepted, hoped = self._sums[depths[above[node]]]
                depths.append(depths[above[node]] + 1)
                path.append(path[above[node]] * min(own[node] * accepted / max(hoped, 1e-9), 1.0))
            chances.append(path)
        return chances


def _scores(proposal: Proposal) -> list[list[float]]:
    """By row and node: the drafter's confidence in it, given its parent; 1 from a drafter that states none."""
    if proposal.scores is None:
        return [[1.0] * proposal.num_nodes] * len(proposal.tokens)
    return proposal.scores.exp().tolist()
