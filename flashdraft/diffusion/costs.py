"""Seconds of a call of the target, by its number of rows: measured once and kept on disk.

A table is of one architecture, shape, dtype, device and machine. It is measured inside the first
denoising loop that needs it, with that loop's own conditions, in few calls: as many as cost some
tens of single ones, whatever a batch takes here. What is larger than the largest that was measured
is thought to lie on a line.

Knows seconds, rows and files. Does not know what a call is, nor what blocks are.
"""

import functools
import hashlib
import json
import math
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashdraft import hub
from flashdraft.errors import InvalidParameter
from flashdraft.files import Facts, write_file
from flashdraft.provenance import processor

__all__ = ["FLAT", "Costs", "KeptCosts", "OwnSeconds", "facts_of", "given_costs", "measure"]

_MULTIPLES = (1, 2, 4, 8, 16, 32)  # of the rows of one step
_PASSES = 5
_PASS = 8.0  # single calls that one pass over all numbers of rows may cost
_ENOUGH = 2.0  # seconds after which no further pass is made
_SLOW = 0.5  # seconds of a call that needs no warming up
_COMPILING = 30.0  # times what a call takes: what its first takes where each shape is compiled
_ROUND = 5  # points that take as long as what a round takes whatever its points are
_FADING = 0.1  # share of what is known of our own seconds that a round replaces at least


class Costs:
    """On lines between what is known. most: rows of the largest call that has room in memory."""

    def __init__(self, seconds: Mapping[int, float], most: int | None = None) -> None:
        self.known: dict[int, float] = {}
        slowest = 0.0
        for rows, value in sorted(seconds.items()):
            slowest = max(slowest, value)  # less for more rows is noise of the measuring
            self.known[rows] = slowest
        self.most = most
        self._rows = list(self.known)

    def with_news(self, other: "Costs") -> "Costs":
        """What is known of either; of the other where both know it."""
        most = other.most
        if most is None:
            most = self.most
        elif self.most is not None:
            most = min(most, self.most)
        return Costs(self.known | other.known, most)

    def __call__(self, rows: int) -> float:
        if self.most is not None and rows > self.most:
            return math.inf
        known = self._rows
        if rows <= known[0]:
            return self.known[known[0]]
        if len(known) == 1:  # each row costs what the others do
            return self.known[known[0]] * rows / known[0]

        above = bisect_left(known, rows)
        above = min(above, len(known) - 1)
        low = known[above - 1]
        high = known[above]
        at_low = self.known[low]
        at_high = self.known[high]
        rise = (at_high - at_low) / (high - low)
        if rows > high:
            return at_high + max(rise, 0.0) * (rows - high)
        return at_low + rise * (rows - low)


FLAT = Costs({1: 1.0, 2: 1.0})  # every call costs the same: rounds are counted, not seconds


def given_costs(given: Mapping[int, float] | str) -> Costs | None:
    """What a user says of costs; None: they shall be measured. Raises InvalidParameter."""
    if given == "measured":
        return None
    if given == "flat":
        return FLAT
    hint = '"measured", "flat", or the seconds of a call by its number of rows: {1: 0.02, 8: 0.03}'
    refusal = InvalidParameter(f"costs is {given!r}", hint=hint, option="costs")
    if not isinstance(given, Mapping):
        raise refusal
    table = _table(given)
    if table is None:
        raise refusal
    return Costs(table)


def _table(given: Mapping[Any, Any]) -> dict[int, float] | None:
    """Seconds by rows, or None for what cannot be that."""
    table = {}
    try:
        for rows, seconds in given.items():
            table[int(rows)] = float(seconds)
    except (TypeError, ValueError):
        return None
    for rows, seconds in table.items():
        if rows < 1 or not 0 < seconds < math.inf:
            return None
    return table or None


# ---- measuring -----------------------------------------------------------------------------------


def measure(call: Callable[[int], object], rows_a_step: int) -> Costs:
    """Medians of the seconds of `call(rows)`, which returns when its rows are computed.

    For multiples of the rows of one step, all in turn, as often as it is worth; no more of them
    than one turn of some single calls pays for, nor than there is memory.
    """
    takes: dict[int, list[float]] = {}
    most = None
    for multiple in _MULTIPLES:
        rows = rows_a_step * multiple
        if takes and _costs_too_much(takes, rows):
            break
        try:
            first = _seconds(call, rows)
            again = _seconds(call, rows) if first < _SLOW else first  # warm now
        except RuntimeError as error:
            if "memory" not in str(error) or not takes:
                raise
            most = rows - 1
            break
        takes[rows] = [again]
        if first > _COMPILING * again + _ENOUGH:
            break

    pass_takes = sum(_firsts(takes).values())
    worth = max(int(_ENOUGH / pass_takes), 1)
    passes = min(_PASSES, worth)
    for _ in range(passes - 1):
        for rows, own in takes.items():
            own.append(_seconds(call, rows))
    return Costs({rows: median(own) for rows, own in takes.items()}, most)


def _firsts(takes: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {rows: own[0] for rows, own in takes.items()}


def _costs_too_much(takes: Mapping[int, Sequence[float]], rows: int) -> bool:
    """Whether a turn with these rows, too, would cost more than it may."""
    known = _firsts(takes)
    single = known[min(known)]
    expected = Costs(known)(rows)
    return sum(known.values()) + expected > _PASS * single


def _seconds(call: Callable[[int], object], rows: int) -> float:
    started = time.perf_counter()
    call(rows)
    return time.perf_counter() - started


# ---- kept on disk --------------------------------------------------------------------------------


_processor = functools.cache(processor)  # read from a file that is long where cores are many


def facts_of(unet: Any, sample: Tensor, conditions: Iterable[Tensor]) -> Facts:
    """All that the seconds of a call hang on, but its rows."""
    config = {}
    for name, value in dict(unet.config).items():
        if not name.startswith("_"):
            config[name] = value
    text = json.dumps(config, sort_keys=True, default=str)
    processors = getattr(unet, "attn_processors", {})
    kinds = {type(one).__name__ for one in processors.values()}
    device = sample.device
    is_cuda = device.type == "cuda"
    return {
        "unet": hashlib.sha256(text.encode()).hexdigest()[:16],
        "attention": sorted(kinds),
        "compiled": getattr(unet, "_compiled_call_impl", None) is not None,
        "shape": list(sample.shape[1:]),
        "conditions": [list(one.shape[1:]) for one in conditions],
        "dtype": str(sample.dtype),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": [platform.node(), platform.machine(), os.cpu_count()],
    }


class KeptCosts:
    """The table of one call, in a file of the cache folder and in this process."""

    _held: ClassVar[dict[Path, Costs]] = {}  # by file: a cache need not be writable

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        text = json.dumps(facts, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = hub.cache_dir() / f"image-costs-{key}.json"

    def read(self, rows_a_step: int) -> Costs | None:
        """What is known, where that says what a block of such steps would cost."""
        known = self._held.get(self.path)
        if known is None:
            known = self._read()
        if known is None or not _says(known, rows_a_step):
            return None
        self._held[self.path] = known
        return known

    def measure(self, call: Callable[[int], object], rows_a_step: int) -> Costs:
        """Measured now, kept beside what is known of other numbers of rows."""
        costs = measure(call, rows_a_step)
        before = self._held.get(self.path) or self._read()
        if before is not None:
            costs = before.with_news(costs)
        self._held[self.path] = costs
        seconds = {str(rows): value for rows, value in costs.known.items()}
        content = {"facts": self._facts, "seconds": seconds, "most": costs.most}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, json.dumps(content, indent=2).encode())
        return costs

    def _read(self) -> Costs | None:
        """None where there is no file, or one that nothing like this could have written."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            facts = content["facts"]
            seconds = content["seconds"]
            most = content["most"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if facts != self._facts or not isinstance(seconds, dict):
            return None
        table = _table(seconds)
        is_limit = most is None or (isinstance(most, int) and most > 0)
        return Costs(table, most) if table and is_limit else None


def _says(costs: Costs, rows_a_step: int) -> bool:
    """Whether single steps of so many rows, and blocks, lie within what was measured."""
    rows = list(costs.known)
    if costs.most is not None and 2 * rows_a_step > costs.most:
        return True
    return rows[0] <= rows_a_step and 2 * rows_a_step <= rows[-1]


# ---- a round -------------------------------------------------------------------------------------


@dataclass
class OwnSeconds:
    """What a round of blocks takes besides the target's call, by the points of its blocks. Nothing
    is known at first, and none is thought of."""

    a_point: float = 0.0
    rounds: int = 0

    def take(self, points: int, seconds: float) -> None:
        self.rounds += 1
        share = max(1 / self.rounds, _FADING)
        self.a_point += share * (seconds / (points + _ROUND) - self.a_point)

    def __call__(self, points: int) -> float:
        return self.a_point * (points + _ROUND)
