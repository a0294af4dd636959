"""How many steps a block should have: as many as bring most steps a second, down to one.

How far a draft's clean latents are from the target's grows with the lag; what that makes of the
chance to stand, the schedule says. Knows distances, chances and seconds. Does not know models.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping

import torch

from flashdraft.diffusion.coupling import SMALLEST, acceptance
from flashdraft.diffusion.sampler import Decision
from flashdraft.diffusion.transitions import Transitions
from flashdraft.process import DOUBLES

__all__ = ["Costs", "Lengths", "weights_of"]

_KEPT = 0.8  # of what is known, at every decision
_HOPELESS = 0.02  # chance of a step to be reached: no block is longer
_TINY = 1e-12
_FIRST = 4  # lags that are tried before anything is known


class Costs:
    """Seconds of a call of the target, by its number of rows: on lines between what is known."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._known = sorted(seconds.items())

    def __call__(self, rows: int) -> float:
        known = self._known
        if len(known) == 1 or rows <= known[0][0]:
            return known[0][1]
        above = min(max(bisect_left(known, (rows,)), 1), len(known) - 1)
        low, first = known[above - 1]
        high, second = known[above]
        return first + (second - first) * (rows - low) / (high - low)


class Lengths:
    """Of one target, draft and schedule; what one image teaches serves the next.

    costs: None stands for calls that cost the same whatever their rows. most: steps of a block.
    """

    def __init__(self, costs: Costs | None, *, most: int = 32) -> None:
        self._costs = costs
        self._most = most
        self._gaps: dict[int, float] = {}  # by lag: squared distance of clean latents, expected
        self._stood: dict[int, float] = {}  # by lag, of a mode without chances

    def learn(self, table: Transitions, decisions: Iterable[Decision], *, exact: bool) -> None:
        """What became of drafted steps."""
        for one in decisions:
            if exact:
                weight = float(weights_of(table)[one.step])
                gap = _distance(one.predicted) ** 2 / max(weight, _TINY)
                _fade(self._gaps, one.lag, gap)
            else:
                _fade(self._stood, one.lag, float(one.stood))

    def best(self, table: Transitions, step: int, rows_a_step: int, *, exact: bool) -> int:
        """For a block from this step on. rows_a_step: of the target's call, for one step of it."""
        left = table.num_steps - step
        hoped = 0.0
        chance = 1.0
        best_rate = 0.0
        best = 1
        for length in range(1, min(left, self._most) + 1):
            hoped += chance
            rate = hoped / self._seconds(rows_a_step * length)
            if rate > best_rate:
                best_rate = rate
                best = length
            chance *= self._chance(table, step + length - 1, length - 1, exact=exact)
            if chance < _HOPELESS:
                break
        return best

    def _seconds(self, rows: int) -> float:
        return 1.0 if self._costs is None else self._costs(rows)

    def _chance(self, table: Transitions, step: int, lag: int, *, exact: bool) -> float:
        known = self._gaps if exact else self._stood
        if not known:
            return 1.0 if lag < _FIRST else 0.0
        nearest = min(known, key=lambda other: abs(other - lag))
        if not exact:
            return known[nearest]
        gap = known[nearest] * max((lag + 1) / (nearest + 1), 1.0)
        length = float(weights_of(table)[step]) * gap
        return float(acceptance(torch.tensor(length, **DOUBLES).sqrt()))


def weights_of(table: Transitions) -> torch.Tensor:
    """By step: what a squared distance of clean latents is taken times, to be one of the means, in
    deviations. Of DDPM it is what the step adds to the signal-to-noise ratio."""
    share = table.clean - table.noise * table.alpha / table.sigma
    return (share / table.deviation.clamp(min=SMALLEST)) ** 2


def _distance(chance: float) -> float:
    """Of two means whose draws are the same with this chance."""
    known = torch.tensor(chance, **DOUBLES).clamp(min=_TINY)
    return float(torch.special.erfinv(1 - known)) * 8**0.5


def _fade(known: dict[int, float], lag: int, value: float) -> None:
    known[lag] = _KEPT * known.get(lag, value) + (1 - _KEPT) * value
