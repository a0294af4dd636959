"""The table of step times: the best of rounds, kept, and forgotten where steps that run contradict
it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import tiny_model

from flashdraft.models import timing
from flashdraft.models.lean import LeanTarget
from flashdraft.models.timing import StepTimes, best_of

pytestmark = pytest.mark.alone


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StepTimes:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    return StepTimes(["a model"], counts=(1, 8))


class Clock:
    """Steps that take these seconds, one after the other."""

    def __init__(self, *takes: float) -> None:
        self.now, self.takes = 0.0, list(takes)

    def step(self, count: int) -> None:
        self.now += self.takes.pop(0)


def test_one_burst_of_other_work_leaves_no_trace_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(5.0, 8.0, 1.0, 9.0, 9.0, 2.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    assert best_of(clock.step, (1, 8), rounds=3) == {1: 1.0, 8: 2.0}


def test_a_table_is_measured_once_and_kept(times: StepTimes) -> None:
    calls: list[int] = []
    first = times.measured(calls.append)
    assert calls.count(1) == calls.count(8) > 1
    calls.clear()
    assert StepTimes(["a model"], counts=(1, 8)).measured(calls.append) == first
    assert not calls
    assert StepTimes(["another model"], counts=(1, 8)).read() is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"1": 1.0}',
        '{"1": "x", "8": 1}',
        '{"1": -1.0, "8": 1.0}',
        '{"1": NaN, "8": 1}',
    ],
)
def test_a_damaged_table_is_measured_again(times: StepTimes, content: str) -> None:
    times.path.parent.mkdir(parents=True, exist_ok=True)
    times.path.write_text(content)
    assert times.read() is None
    assert set(times.measured(lambda count: None)) == {1, 8}


def test_steps_that_are_much_quicker_than_the_table_renew_it(times: StepTimes) -> None:
    times.keep({1: 1.0, 8: 2.0})
    for seconds in (0.9, 0.85, 0.5, 1.0, 0.5):
        times.check(1, seconds, long=False)
    assert times.read() is not None
    times.check(8, 0.5, long=True)
    assert times.read() is None
    times.check(8, 0.5, long=True)  # nothing is known any more, and nothing is asked


def test_steps_that_stay_much_slower_renew_it_once_and_a_few_do_not(times: StepTimes) -> None:
    times.keep({1: 1.0, 8: 2.0})
    for _ in range(3):
        for _ in range(40):
            times.check(1, 5.0, long=False)
        times.check(1, 1.1, long=False)
    for _ in range(80):
        times.check(1, 5.0, long=True)  # a long context takes longer, and says nothing
    assert times.read() is not None
    for _ in range(50):
        times.check(1, 5.0, long=False)
    assert times.read() is None


@pytest.mark.parametrize(("count", "known"), [(3, {1: 1.0, 8: 2.0}), (9, {4: 1.0, 8: 2.0})])
def test_sizes_that_the_table_says_nothing_of_are_not_judged(
    times: StepTimes, count: int, known: dict[int, float]
) -> None:
    times.keep(known)
    for _ in range(100):
        times.check(count, 0.01, long=False)
    assert times.path.exists()


def test_sizes_between_two_known_ones_are_judged(times: StepTimes) -> None:
    """Drafts of two and four tokens are what a table of a busy machine would lead to."""
    times.keep({1: 1.0, 2: 2.0, 4: 4.0})
    for _ in range(3):
        times.check(3, 2.5, long=False)
    assert times.path.exists()
    for _ in range(3):
        times.check(3, 2.3, long=False)
    assert not times.path.exists()


def test_decoding_renews_a_table_that_was_made_on_a_busy_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path))
    target = LeanTarget(tiny_model("llama"), "toy", kernel="torch")
    honest = target.step_seconds
    (path,) = tmp_path.glob("seconds-*.json")
    path.write_text(json.dumps({count: 60.0 for count in honest}))
    fresh = LeanTarget(tiny_model("llama"), "toy", kernel="torch")
    assert fresh.step_seconds[1] == 60.0
    step = fresh._timed_step()
    for _ in range(3):
        step(1)
    assert not path.exists()
    started = time.perf_counter()
    assert fresh.step_seconds[1] < 30.0
    assert time.perf_counter() - started < 30.0
