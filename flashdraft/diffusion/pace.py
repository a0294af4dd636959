"""How long the blocks of a loop are, by what is known of seconds and of chances.

Knows costs and lengths. Does not know pipelines.
"""

from flashdraft.diffusion.costs import Costs, OwnSeconds
from flashdraft.diffusion.lengths import Lengths, weights_of
from flashdraft.diffusion.sampler import BlockSampler

__all__ = ["Pace"]

_MOST = 64  # schedules and guidances that are known at a time
_DIGITS = 4  # of a scale of guidance: one that is fitted to outputs is never twice the same


class Pace:
    """What is known of seconds and of lengths, from call to call of the pipe. given: costs that
    are not measured."""

    def __init__(self, given: Costs | None) -> None:
        self.given = given
        self.own = OwnSeconds()
        self._lengths: dict[tuple[object, ...], Lengths] = {}

    @property
    def is_measured(self) -> bool:
        return self.given is None

    def lengths(self, sampler: BlockSampler, guidance: tuple[float, float]) -> Lengths:
        """Of one schedule and guidance."""
        rounded = [round(one, _DIGITS) for one in guidance]
        key = (*rounded, *weights_of(sampler.table).tolist())
        if key not in self._lengths:
            if len(self._lengths) == _MOST:
                oldest = next(iter(self._lengths))
                del self._lengths[oldest]
            self._lengths[key] = Lengths(sampler.table, sampler.tol)
        return self._lengths[key]
