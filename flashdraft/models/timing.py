"""What a target's steps take on this machine: the best of several short rounds, kept on disk.

A machine may be busy while it is measured. So the rounds go through all sizes of steps in turn and
the quickest of each counts, and every step that really runs is held against the table: where they
contradict each other, it is measured anew.

Knows seconds by numbers of tokens. Does not know what a step is.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flashdraft import hub
from flashdraft.files import write_file

__all__ = ["COUNTS", "StepTimes", "best_of"]

COUNTS = (1, 2, 4, 8, 16, 32)  # tokens of a step
_ROUNDS = 6

# So many steps that take less than this share of what is known: it was measured on a busy machine.
_QUICKER = 0.8
_QUICK_STEPS = 3
# So many in a row that take more than this: it is another machine, or was another load.
_SLOWER = 2.5
_SLOW_STEPS = 50


def best_of(
    step: Callable[[int], object], counts: Sequence[int], rounds: int = _ROUNDS
) -> dict[int, float]:
    """Seconds of `step(count)`, the quickest of all rounds, by count."""
    best = dict.fromkeys(counts, math.inf)
    for _ in range(rounds):
        for count in counts:
            started = time.perf_counter()
            step(count)
            best[count] = min(best[count], time.perf_counter() - started)
    return best


class StepTimes:
    """The table of one model, kernel, number of threads and machine, all of which `facts` tell."""

    def __init__(self, facts: Sequence[object], counts: Sequence[int] = COUNTS) -> None:
        text = json.dumps(list(facts), sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = hub.cache_dir() / f"seconds-{key}.json"
        self.counts = tuple(counts)
        self._held: dict[int, float] | None = None  # what steps are held against
        self._quick = 0
        self._slow = 0

    def read(self) -> dict[int, float] | None:
        """What is known, or None."""
        return _read(self.path, self.counts)

    def measured(self, step: Callable[[int], object]) -> dict[int, float]:
        """What is known, measured now if nothing is."""
        known = self.read()
        if known is not None:
            return known
        return self.measure(step)

    def measure(self, step: Callable[[int], object]) -> dict[int, float]:
        """Measure and keep it; a cache folder that cannot be written costs this again, no more."""
        table = best_of(step, self.counts)
        self.keep(table)
        return table

    def keep(self, table: Mapping[int, float]) -> None:
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(dict(table)).encode())
        self._held = dict(table)

    def check(self, count: int, seconds: float, *, long: bool) -> None:
        """Hold a step that really ran against the table.

        Where the two contradict each other, the table is forgotten.
        long: the step read a long context, which the table's steps do not; it may well take longer.
        """
        if self._held is None:
            self._held = self.read() or {}
        expected = _expected(self._held, count)
        if expected is None:
            return

        if seconds < _QUICKER * expected:
            self._quick += 1
        if seconds < _SLOWER * expected:
            self._slow = 0
        elif not long:
            self._slow += 1

        if self._quick >= _QUICK_STEPS or self._slow >= _SLOW_STEPS:
            self.forget()

    def forget(self) -> None:
        """The next one who asks measures again."""
        self._held = {}
        self._quick = 0
        self._slow = 0
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _expected(table: Mapping[int, float], count: int) -> float | None:
    """Seconds of a step of so many tokens, between two that are known on the line through them.

    None beyond the table, and where the two are far apart: steps may grow by jumps between them.
    """
    if count in table:
        return table[count]
    below = [known for known in table if known < count]
    above = [known for known in table if known > count]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    if high > 2 * low:
        return None
    share = (count - low) / (high - low)
    return table[low] + share * (table[high] - table[low])


def _read(path: Path, counts: Sequence[int]) -> dict[int, float] | None:
    """The table of a file; None where there is none, or one that nothing could have measured."""
    table = {}
    try:
        stored: Mapping[str, float] = json.loads(path.read_text(encoding="utf-8"))
        for count in counts:
            table[count] = float(stored[str(count)])
    except (OSError, ValueError, KeyError, TypeError):
        return None

    for seconds in table.values():
        if not 0 < seconds < math.inf:
            return None
    return table
