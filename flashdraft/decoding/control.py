"""How many nodes of a proposal the target should read: as many as pay for their time, down to none.

Knows scores, sizes and seconds. Does not know methods, models or tokens. Over the whole batch,
nodes are taken in the order of their paths' confidence as long as that brings more committed tokens
a second (the idea of D-Cut). A drawn node's score is fixed before its own token is drawn, so that
trimming changes no law; chosen nodes may go for any reason.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from flashdraft.process import INTS, new_lock
from flashdraft.types import Proposal

__all__ = ["Control"]

P = ParamSpec("P")
R = TypeVar("R")

_MEMORY = 0.98  # what a calibration keeps of its past at every observation
_SMOOTH = 0.8  # the same for drafting's times

# What drafting might gain at least, to plain decoding, to be done: more where rows that leave a
# batch early gain nobody anything.
_WORTH = {1: 1.02, 2: 1.05, 3: 1.05}
_WORTH_OF_MANY = 1.08
_FIRST = 2  # plain steps before the first drafts: what those are compared with
_LOOK = 16  # drafted steps until a plain one is looked at, where drafts hardly pay; else more
_NOISE = 1e-2  # variance of one step's time, in plain steps
_LEAST_TIME = 0.2  # of what the table says, that a plain step is believed to take

# What drafting may lose, in plain steps: at first (by the number of rows: a step of many rows tells
# as much as many steps), more for every plain step, and no more than so many at once.
_FIRST_CREDIT = {1: 4.0, 2: 2.0, 3: 2.0}
_CREDIT_OF_MANY = 1.0
_ALLOWED = 0.01
_CREDIT = 6.0

# The Kalman filter of what steps take beyond the table (see `learn`): its three numbers' variances
# before any step was seen, and how these grow with every step.
_UNSURE = (0.1, 0.1, 0.003)
_DRIFT = (4e-4, 1e-5, 1e-6)

# The same of drafting's gain; no proposal counts for less than _POOR.
_GAIN = 0.16
_GAIN_DRIFT = 1e-4
_POOR = 0.7

# The variance of single proposals around the gain: at first, at least, and what is kept of it.
_SPREAD = 0.25
_SPREAD_OF_NEW = 0.2  # at least, when a text begins
_LEAST = 0.02
_FADE = 0.9


class _Batch:
    """What is known of steps of about as many rows: 1, 2, 3, 4 or 5, 6 or 7, 8 to 11, and so on."""

    def __init__(self, rows: int) -> None:
        """rows: the least number of them."""
        self.rows = rows
        self.draft = 0.0  # seconds of drafting in a step
        self.since = -_FIRST  # drafted steps since the last plain one; below 0: plain ones to do
        self.was_drafted = False  # the step before
        self.gain = 1.0  # tokens a second, to plain decoding: the mean
        self.unsure = _GAIN  # its variance
        self.spread = _SPREAD  # of single proposals around it
        # Plain steps that drafting may still lose, see `weighed`.
        self.credit = _FIRST_CREDIT.get(rows, _CREDIT_OF_MANY)
        self.beyond = [0.0] * len(_UNSURE)  # what steps take beyond the table, see `learn`
        self.doubt: list[list[float]] = []  # its covariances
        for i, variance in enumerate(_UNSURE):
            row = [0.0] * len(_UNSURE)
            row[i] = variance
            self.doubt.append(row)

    def took(self, beyond: float, *parts: float) -> None:
        """One step's time beyond the table: a Kalman filter's update.

        parts: how often that time has each number of `self.beyond` in it.
        """
        for k, drift in enumerate(_DRIFT):
            self.doubt[k][k] += drift

        moves = [_dot(row, parts) for row in self.doubt]
        scale = 1 / (_dot(moves, parts) + _NOISE)
        error = beyond - _dot(self.beyond, parts)
        for i, move in enumerate(moves):
            self.beyond[i] += scale * move * error
        for row, move in zip(self.doubt, moves, strict=True):
            row[:] = [old - scale * move * other for old, other in zip(row, moves, strict=True)]

    def promised(self, gain: float, share: float) -> None:
        """One proposal's gain, for a step of `share` of a plain one's time: the same update."""
        gain = max(gain, _POOR)  # a slow first draft must not look hopeless for ever
        surprise = (gain - self.gain) ** 2
        self.spread = max(_FADE * self.spread + (1 - _FADE) * surprise, _LEAST)
        weight = self.unsure / (self.unsure + self.spread / share)
        self.gain += weight * (gain - self.gain)
        self.unsure *= 1 - weight

    def weighed(self, tokens_a_row: float, plain_steps: float) -> None:
        """What a drafted step brought, against the time of so many plain ones: the promises above
        may be too good, and this is what bounds their cost.

        A gain is put aside, a loss is paid from that; with nothing left, nothing is drafted until
        plain steps have earned another try.
        """
        credit = self.credit + tokens_a_row - plain_steps
        self.credit = min(max(credit, -_CREDIT), _CREDIT)

    def drafted(self, seconds: float, plain: float) -> float:
        """What drafting took in a step; returns what of it counts. plain: seconds of a step that
        drafts nothing.

        No time counts for more than twice what is usual, the first one's for no more than a step:
        one may be held up.
        """
        usual = self.draft or min(seconds, plain)
        counted = min(seconds, 2 * usual)
        self.draft = _SMOOTH * usual + (1 - _SMOOTH) * counted
        self.since += 1
        looks_at_plain = self.since >= _LOOK * max(self.gain, 1.0) ** 3
        if looks_at_plain:
            self.since = -_FIRST
        return counted


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    total = 0.0
    for a, b in zip(left, right, strict=True):
        total += a * b
    return total


def _one_at_a_time(
    method: Callable[Concatenate[Control, P], R],
) -> Callable[Concatenate[Control, P], R]:
    @functools.wraps(method)
    def call(self: Control, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class _Chance(NamedTuple):
    """A node that could be read, and how likely its whole path is to be accepted."""

    confidence: float
    row: int


@dataclass
class _Calibration:
    """Of the nodes at one depth behind accepted parents: how many were accepted, and hoped for."""

    accepted: float = 2.0
    hoped: float = 2.0

    def observe(self, is_accepted: bool, hope: float) -> None:
        """One node more; what is older fades."""
        self.accepted = _MEMORY * self.accepted + is_accepted
        self.hoped = _MEMORY * self.hoped + hope

    def shrink(self) -> None:
        """Keep the ratio, with the weight of two nodes."""
        self.accepted = 2 * self.accepted / max(self.hoped, 1e-9)
        self.hoped = 2.0

    def chance(self, score: float) -> float:
        """Of a node with this score to be accepted, given its parent."""
        return min(score * self.accepted / max(self.hoped, 1e-9), 1.0)


Calibrations = dict[int, _Calibration]  # by the parent's depth; a new one where none is


class _Choice(NamedTuple):
    sizes: Tensor  # [rows]
    gain: float  # tokens a second, to plain decoding
    share: float  # the step's time, in plain ones
    is_of_any: bool  # whether there was anything to choose


class Control:
    """One for a target with its drafter: what it has learned from one text serves the next.

    seconds: of a target's step of one row, by its number of tokens (two or more entries).
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._lock = new_lock()  # streams of several threads may share it
        self._known = sorted(seconds.items())
        # by parent's depth; free drafts have their own
        self._calibrations: Calibrations = defaultdict(_Calibration)
        self._free_calibrations: Calibrations = defaultdict(_Calibration)
        self._batches: dict[int, _Batch] = {}  # by the least number of their rows

    @_one_at_a_time
    def begin(self) -> None:
        """A text begins that is alone: what others accepted says little of it.

        It says more of a batch, in which texts mix.
        """
        for calibrations in (self._calibrations, self._free_calibrations):
            for calibration in calibrations.values():
                calibration.shrink()
        for batch in self._batches.values():
            if batch.rows == 1:
                batch.credit = max(batch.credit, _FIRST_CREDIT[1])
                # else one poor proposal after a text of poor ones would speak for the whole text
                batch.spread = max(batch.spread, _SPREAD_OF_NEW)
            batch.unsure = max(batch.unsure, _GAIN / batch.rows)

    @_one_at_a_time
    def wants_drafts(self, rows: int, gain: float = 1.0) -> bool:
        """Whether the next step of so many rows should draft: it may well gain something.

        gain: what the step promises without, to plain decoding; above 1 where drafts are free.

        What is not tried grows less sure with every step, and is tried again: soon where little was
        lost, seldom where much was.
        """
        batch = self._batch(rows)
        has_plain_steps_to_do = batch.since < 0
        if has_plain_steps_to_do or batch.credit <= 0:
            return False
        hoped_gain = batch.gain + math.sqrt(batch.unsure)
        return hoped_gain > gain * _WORTH.get(batch.rows, _WORTH_OF_MANY)

    @_one_at_a_time
    def trim(self, proposal: Proposal) -> Tensor:
        """How many nodes of each row pay: [rows], 1 or more and no more than there are."""
        batch = self._batch(len(proposal.sizes))
        choice = self._choice(proposal, batch, is_free=False)
        if choice.is_of_any:
            batch.promised(choice.gain, choice.share)
        return choice.sizes

    @_one_at_a_time
    def trim_free(self, proposal: Proposal) -> tuple[Tensor, float]:
        """The same of a proposal that took no time, and what the step promises by it, to plain
        decoding: 1 or more."""
        batch = self._batch(len(proposal.sizes))
        choice = self._choice(proposal, batch, is_free=True)
        return choice.sizes, choice.gain

    def _choice(self, proposal: Proposal, batch: _Batch, *, is_free: bool) -> _Choice:
        """The nodes that bring most committed tokens a second."""
        calibrations = self._free_calibrations if is_free else self._calibrations
        chances = _chances(proposal, calibrations)
        rows = len(proposal.sizes)
        always, when_drafting, a_node = batch.beyond
        step = self.cost(rows)
        plain = self._plain(batch, rows)
        spent = step * always
        if not is_free:
            spent += batch.draft + step * when_drafting

        anchors = _Chance(float(rows), 0)  # every row commits one token, whatever it drafts
        hope = 0.0
        best = 0.0
        kept = 0
        share = 1.0
        for count, chance in enumerate([anchors, *chances]):
            hope += chance.confidence
            time = max(self.cost(rows + count) + spent + step * a_node * count / rows, plain)
            rate = hope / time
            if rate > best:
                best = rate
                kept = count
                share = time / plain
            elif proposal.drawn is not None:
                # what comes behind a drawn node may not speak for it: it has seen its token
                break

        kept_by_row = Counter(chance.row for chance in chances[:kept])
        sizes = torch.tensor([1 + kept_by_row[row] for row in range(rows)], **INTS)
        return _Choice(sizes, best * plain / rows, share, is_of_any=bool(chances))

    @_one_at_a_time
    def learn(
        self,
        proposal: Proposal,
        paths: Sequence[Sequence[int]],
        draft_seconds: float | None,
        seconds: float,
    ) -> None:
        """What became of a proposal that `trim` gave, or `trim_free`.

        seconds: of the whole step; draft_seconds: of propose and observe, None without drafts or
        with free ones.

        Steps take more or less than the table says, in steps of the table: all of them (a longer
        context, a machine that slows down), drafted ones (several rows' caches) and each drafted
        node a row (a busy machine multiplies more slowly than it reads). No time counts for more
        than a step of the table beyond what is usual: one step may be held up.
        """
        rows = len(paths)
        batch = self._batch(rows)
        nodes = int(proposal.sizes.sum())
        is_drafted = draft_seconds is not None
        drafted_a_row = nodes / rows - 1
        target_seconds = seconds - (draft_seconds or 0.0)
        beyond = (target_seconds - self.cost(nodes)) / self.cost(rows)
        parts = (1.0, float(is_drafted), drafted_a_row)
        usual = _dot(batch.beyond, parts)
        beyond = min(max(beyond, _LEAST_TIME - 1), usual + 1.0)
        if batch.was_drafted and not is_drafted:
            # Threads of the drafts before may still be spinning: it is no sign of a slow machine.
            beyond = min(beyond, usual)
        batch.was_drafted = is_drafted
        batch.took(beyond, *parts)
        batch.unsure = min(batch.unsure + _GAIN_DRIFT, _GAIN)
        if draft_seconds is None:
            batch.since = min(batch.since + 1, 0)
            batch.credit = min(batch.credit + _ALLOWED, _CREDIT)
            _calibrate(proposal, paths, self._free_calibrations)
            return

        counted = batch.drafted(draft_seconds, plain=self.cost(rows))
        plain = self._plain(batch, rows)
        took = self.cost(nodes) + beyond * self.cost(rows) + counted
        tokens = sum(len(path) for path in paths)
        batch.weighed(tokens / rows, took / plain)
        _calibrate(proposal, paths, self._calibrations)

    def _batch(self, rows: int) -> _Batch:
        """What is known of so many rows: two leading bits of their number tell it."""
        lower_bits = max(rows.bit_length() - 2, 0)
        least = rows >> lower_bits << lower_bits
        if least not in self._batches:
            self._batches[least] = _Batch(least)
        return self._batches[least]

    def _plain(self, batch: _Batch, rows: int) -> float:
        """Seconds of a step that drafts nothing. What the filter believes may be below nothing."""
        return self.cost(rows) * max(1 + batch.beyond[0], _LEAST_TIME)

    def cost(self, tokens: int) -> float:
        """Seconds of a step of so many tokens.

        On the line through the two known numbers around it, or the last two.
        """
        above = bisect_left(self._known, (tokens,))
        above = min(max(above, 1), len(self._known) - 1)
        low, first = self._known[above - 1]
        high, second = self._known[above]
        return first + (second - first) * (tokens - low) / (high - low)


def _chances(proposal: Proposal, calibrations: Calibrations) -> list[_Chance]:
    """All nodes behind the anchors, the likeliest first."""
    chances = []
    rows = zip(_confidence(proposal, calibrations), proposal.sizes.tolist(), strict=True)
    for row, (confidence, size) in enumerate(rows):
        for node in range(1, size):
            chances.append(_Chance(confidence[node], row))
    return sorted(chances, key=itemgetter(0), reverse=True)


def _confidence(proposal: Proposal, calibrations: Calibrations) -> list[list[float]]:
    """By row and node: the chance that the whole path to it is accepted, as calibrated."""
    confidence = []
    for scores, parents in zip(_scores(proposal), proposal.parents.tolist(), strict=True):
        of_path = [1.0]
        depths = [0]
        for node in range(1, proposal.num_nodes):
            parent = parents[node]
            calibration = calibrations[depths[parent]]
            of_path.append(of_path[parent] * calibration.chance(scores[node]))
            depths.append(depths[parent] + 1)
        confidence.append(of_path)
    return confidence


def _calibrate(
    proposal: Proposal, paths: Sequence[Sequence[int]], calibrations: Calibrations
) -> None:
    """Hold the scores of all nodes behind accepted parents against what was accepted."""
    rows = zip(
        paths,
        _scores(proposal),
        proposal.parents.tolist(),
        proposal.sizes.tolist(),
        strict=True,
    )
    for path, scores, parents, size in rows:
        depths = {node: depth for depth, node in enumerate(path)}
        for node in range(1, size):
            depth = depths.get(parents[node])
            if depth is not None:
                calibrations[depth].observe(node in depths, scores[node])


def _scores(proposal: Proposal) -> list[list[float]]:
    """By row and node: the drafter's confidence in it, given its parent; 1 where none is stated."""
    if proposal.scores is None:
        return [[1.0] * proposal.num_nodes] * len(proposal.tokens)
    scores: list[list[float]] = proposal.scores.exp().tolist()
    return scores
