"""How many steps a block should have: as many as bring most steps a second, down to one.

How far a draft's clean latents are from the target's grows with the lag and changes along the
schedule; what that makes of the chance to stand, the schedule says. Only decisions teach: what the
target said of points behind a refusal hangs on noises that are still to be used, and a length that
hung on them would not leave the law of the images alone.

Knows distances, defects, chances and seconds. Does not know models, nor where seconds are from.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from flashdraft.diffusion.coupling import SMALLEST
from flashdraft.diffusion.sampler import Decision
from flashdraft.diffusion.transitions import Transitions

__all__ = ["Lengths", "weights_of"]

_PHASES = 16  # parts of the schedule that are learned apart
_FADING = 0.05  # share of what is known that a decision replaces at least
_HOPELESS = 0.02  # chance of a step to be reached: no block is longer
_FIRST = 4  # lags that are tried before anything is known
_WORTH = 1.03  # steps a second of a block over single ones': less is noise of the measuring
_PERIOD = 32  # single steps until a block of two is tried
_SPREAD = 0.5  # of the logarithms of one lag's defects
_SLOPE = 2.0  # power of the lag that a defect grows with, where nothing is known
_SMALLEST_DEFECT = 1e-9
_SMALLEST_CHANCE = 1e-12
_NORMAL = NormalDist()


class Lengths:
    """Of one target, draft and schedule; what one image teaches serves the next.

    tol: of tolerance mode, None in exact mode. most: steps of a block.
    """

    def __init__(self, table: Transitions, tol: float | None, *, most: int = 32) -> None:
        self._num_steps = table.num_steps
        self._weights: list[float] = weights_of(table).tolist()
        self._is_random: list[bool] = (table.deviation >= SMALLEST).tolist()
        self._tol = tol
        self._most = most
        self._known: list[dict[int, _Mean]] = [{} for _ in range(_PHASES)]
        self._singles = 0

    def learn(self, decisions: Iterable[Decision]) -> None:
        """What became of drafted steps."""
        for one in decisions:
            value = self._value(one)
            if value is not None and math.isfinite(value):
                known = self._known[self._phase(one.step)]
                known.setdefault(one.lag, _Mean()).take(value)

    def choose(self, step: int, seconds: Callable[[int], float]) -> int:
        """`best`, but that now and then a block is tried where single steps seem to be better."""
        best = self.best(step, seconds)
        if best > 1 or step + 1 >= self._num_steps:
            return best
        self._singles += 1
        could_pay = 2 * seconds(1) > _WORTH * seconds(2)
        return 2 if could_pay and self._singles % _PERIOD == 0 else 1

    def best(self, step: int, seconds: Callable[[int], float]) -> int:
        """Of a block from this step on: with most committed steps expected a second.

        seconds: of a round, by the length of its blocks; it does not fall with it.
        """
        most = min(self._num_steps - step, self._most)
        single_rate = 1 / seconds(1)
        best = 1
        best_rate = single_rate * _WORTH
        hoped = 1.0
        reached = 1.0
        for length in range(2, most + 1):
            reached *= self.chance(step + length - 2, length - 2)
            if reached < _HOPELESS:
                break
            hoped += reached
            takes = seconds(length)
            rate = hoped / takes
            if rate > best_rate:
                best_rate = rate
                best = length
            if hoped + reached * (most - length) < best_rate * takes:
                break  # no longer one can be better
        return best

    def chance(self, step: int, lag: int) -> float:
        """That a draft of this step stands, so many steps behind its block's first point."""
        known = self._nearest(self._phase(step))
        if known is None:
            return 1.0 if lag < _FIRST else 0.0
        nearest = min(known, key=lambda other: abs(other - lag))
        value = known[nearest].value
        growth = (lag + 1) / (nearest + 1)
        if self._tol is not None:
            return self._within_tol(value + _SLOPE * math.log(growth))
        gap = value * max(growth, 1.0)
        distance = math.sqrt(self._weights[step] * gap)
        return math.erfc(distance / math.sqrt(8))

    def _within_tol(self, log_defect: float) -> float:
        assert self._tol is not None
        room = math.log(max(self._tol, _SMALLEST_DEFECT)) - log_defect
        return _NORMAL.cdf(room / _SPREAD)

    def _value(self, one: Decision) -> float | None:
        """What is learned: the squared distance of the clean latents, or the logarithm of the
        defect."""
        if self._tol is not None:
            return math.log(max(one.defect, _SMALLEST_DEFECT))
        if not self._is_random[one.step] or self._weights[one.step] == 0:
            return None
        distance = -2 * _NORMAL.inv_cdf(max(one.predicted, _SMALLEST_CHANCE) / 2)
        return distance**2 / self._weights[one.step]

    def _phase(self, step: int) -> int:
        return step * _PHASES // self._num_steps

    def _nearest(self, phase: int) -> "dict[int, _Mean] | None":
        """What is known of the nearest phase that anything is known of, the earlier of two."""
        for away in range(_PHASES):
            for other in (phase - away, phase + away):
                if 0 <= other < _PHASES and self._known[other]:
                    return self._known[other]
        return None


@dataclass
class _Mean:
    """Of all values at first, then of the last ones more."""

    value: float = 0.0
    count: int = 0

    def take(self, value: float) -> None:
        self.count += 1
        share = max(1 / self.count, _FADING)
        self.value += share * (value - self.value)


def weights_of(table: Transitions) -> torch.Tensor:
    """By step: what a squared distance of clean latents is taken times, to be one of the means, in
    deviations. Of DDPM it is what the step adds to the signal-to-noise ratio."""
    share = table.clean - table.noise * table.alpha / table.sigma
    return (share / table.deviation.clamp(min=SMALLEST)) ** 2
