"""The scheduler by itself, without tensors: who gets a row, what is read next, and what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flashdraft import scheduler as module
from flashdraft.errors import ContextLengthError
from flashdraft.scheduler import Part, Placement, Scheduler

OWNERS = ("", "one", "another")
LONG = tuple(range(100, 140))  # longer than what requests may read side by side


@dataclass
class Asked:
    """As much of a request as the scheduler reads."""

    index: int
    prompt: list[int]
    new: int = 4
    owner: str = ""
    shares: bool = True
    history: list[int] = field(default_factory=list)

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.new


def asked(index: int, prompt: Sequence[int] = (1, 2, 3), **options: Any) -> Asked:
    return Asked(index, list(prompt), **options)


def placed(scheduler: Scheduler[Asked]) -> list[Placement[Asked]]:
    """All that get a row now; each begins with as much as was promised to it."""
    found = []
    while placement := scheduler.place():
        placement.request.history = list(placement.request.prompt)
        scheduler.resumed(placement.row, placement.num_shared)
        found.append(placement)
    scheduler.crowded_out()
    return found


def indices(placements: Sequence[Placement[Asked]]) -> list[int]:
    return [placement.request.index for placement in placements]


def read_all(scheduler: Scheduler[Asked]) -> None:
    while scheduler.reading:
        for part in scheduler.parts():
            if scheduler.read(part):
                scheduler.running[part.row].history.append(0)


def finished(scheduler: Scheduler[Asked], row: int) -> None:
    request = scheduler.requests()[row]
    scheduler.finish(row, request.history[:-1])


def kept(*texts: Sequence[int], owner: str = "", **options: Any) -> Scheduler[Asked]:
    """One that keeps these texts, the first one longest; row by row."""
    made = Scheduler[Asked](keeps=True, **{"max_rows": len(texts), **options})
    for index, text in enumerate(texts):
        made.submit(asked(-1 - index, text, owner=owner))
        placed(made)
        read_all(made)
    for row in range(len(texts)):
        finished(made, row)
    return made


# ---- who gets a row ------------------------------------------------------------------------------


def test_the_first_that_comes_is_the_first_that_is_placed() -> None:
    made = Scheduler[Asked](max_rows=2)
    for index in range(4):
        made.submit(asked(index))
    assert indices(placed(made)) == [0, 1]
    assert placed(made) == []
    read_all(made)
    finished(made, 1)
    assert [(p.request.index, p.row) for p in placed(made)] == [(2, 1)]
    assert made.num_free == 0
    assert made.has_work


def test_nobody_overtakes_one_that_waits_for_room() -> None:
    made = Scheduler[Asked](max_rows=4, max_tokens=30)
    for index, new in enumerate((10, 20, 2, 2)):
        made.submit(asked(index, new=new))
    assert indices(placed(made)) == [0]  # 13 of 30; the next one may come to 23
    read_all(made)
    assert placed(made) == []
    finished(made, 0)
    assert indices(placed(made)) == [1, 2]
    assert made.num_promised == 23 + 5


def test_the_budget_may_be_filled_to_the_last_token() -> None:
    made = Scheduler[Asked](max_rows=3, max_tokens=21)
    for index in range(3):
        made.submit(asked(index))
    assert indices(placed(made)) == [0, 1, 2]
    assert made.num_promised == 21


def test_a_request_that_would_never_fit_is_refused_with_both_numbers() -> None:
    made = Scheduler[Asked](max_tokens=6)
    with pytest.raises(ContextLengthError, match=r"come to 7.*holds 6") as caught:
        made.submit(asked(0))
    assert caught.value.hint
    assert not made.has_work
    made.submit(asked(1, new=3))
    assert indices(placed(made)) == [1]


# ---- what is kept --------------------------------------------------------------------------------


def test_what_is_kept_gives_way_the_oldest_first() -> None:
    made = kept((1, 2, 3, 4), (11, 12, 13), (21, 22), max_rows=4, max_tokens=24)
    assert made.num_kept == 9
    made.submit(asked(0, (31, 32, 33), new=14))  # 17 and 9 are 26: two must go, the first has four
    while made.place():
        pass
    assert made.crowded_out() == [0]
    assert list(made.kept) == [1, 2]
    assert made.num_promised + made.num_kept == 22


def test_a_text_that_fits_its_kept_row_takes_it_as_it_is() -> None:
    made = kept((1, 2, 3, 4, 5), (11, 12, 13), max_rows=3)
    made.submit(asked(0, (1, 2, 3, 4, 5, 6, 7)))
    (placement,) = placed(made)
    assert (placement.row, placement.source, placement.num_shared) == (0, 0, 4)
    assert list(made.kept) == [1]


def test_a_kept_text_that_would_lose_much_is_copied() -> None:
    text = (*range(1, 40), *range(1000, 1000 + module._LOSS))
    made = kept(text, max_rows=2)
    made.submit(asked(0, (*range(1, 40), 7)))
    (placement,) = placed(made)
    assert (placement.row, placement.source, placement.num_shared) == (1, 0, 38)
    assert list(made.kept) == [0]


def test_the_only_row_is_cut_back_however_much_it_loses() -> None:
    text = (*range(1, 40), *range(1000, 1000 + module._LOSS))
    made = kept(text)
    made.submit(asked(0, (*range(1, 40), 7)))
    (placement,) = placed(made)
    assert (placement.row, placement.source, placement.num_shared) == (0, 0, 38)
    assert not made.kept


def test_a_new_text_takes_an_empty_row_and_then_the_oldest_kept_one() -> None:
    made = kept((1, 2, 3), (11, 12, 13), max_rows=3)
    for index, prompt in enumerate(((21, 22), (31, 32))):
        made.submit(asked(index, prompt))
    assert [(p.row, p.source) for p in placed(made)] == [(2, None), (0, None)]


def test_what_others_begin_with_stays_longer_than_what_nobody_wants() -> None:
    long = tuple(range(100, 200))
    made = kept(long, (11, 12, 13), max_rows=4, max_tokens=150)
    made.submit(asked(0, (*long[:20], 1), new=20))  # copied: most of the long one would be lost
    (placement,) = placed(made)
    assert (placement.row, placement.source, placement.num_shared) == (2, 0, 19)
    assert list(made.kept) == [1, 0]


def test_the_last_token_is_read_though_all_are_known() -> None:
    """Its logits are needed; and one token less than is alike is taken over."""
    made = kept((1, 2, 3, 4, 5))
    made.submit(asked(0, (1, 2, 3, 4, 5)))
    (placement,) = placed(made)
    assert placement.num_shared == 4
    made = kept((1, 2, 3, 9, 9))
    made.submit(asked(0, (1, 2, 3, 4, 5)))
    (placement,) = placed(made)
    assert placement.num_shared == 2


def test_spare_rows_keep_texts_while_all_others_run() -> None:
    made = kept((1, 2, 3, 4), max_rows=1, spare=1)
    made.submit(asked(0, (11, 12)))
    made.submit(asked(1, (1, 2, 3, 4, 5)))
    (placement,) = placed(made)
    assert (placement.row, list(made.kept), made.num_free) == (1, [0], 0)
    read_all(made)
    finished(made, 1)
    (placement,) = placed(made)
    assert (placement.request.index, placement.source, placement.num_shared) == (1, 0, 3)


def test_owners_share_nothing() -> None:
    made = kept((1, 2, 3, 4, 5), owner="one", max_rows=4)
    made.submit(asked(0, (1, 2, 3, 4, 5, 6), owner="another"))
    made.submit(asked(1, (1, 2, 3, 4, 5, 6)))
    made.submit(asked(2, (1, 2, 3, 4, 5, 6), owner="one"))
    assert [(p.source, p.num_shared) for p in placed(made)] == [(None, 0), (None, 0), (0, 4)]


def test_who_wants_the_logits_of_its_prompt_shares_nothing_of_others() -> None:
    made = kept((1, 2, 3, 4, 5), max_rows=2)
    made.submit(asked(0, (1, 2, 3, 4, 5, 6), shares=False))
    (placement,) = placed(made)
    assert (placement.row, placement.source) == (1, None)


def test_one_that_keeps_nothing_shares_nothing() -> None:
    made = Scheduler[Asked](max_rows=2)
    made.submit(asked(0, LONG))
    made.submit(asked(1, LONG))
    assert [p.source for p in placed(made)] == [None, None]
    read_all(made)
    finished(made, 0)
    assert not made.kept


# ---- those that wait for a text that is being read -----------------------------------------------


def test_the_same_prompt_is_read_once_and_then_copied() -> None:
    made = Scheduler[Asked](max_rows=4, keeps=True, chunk=8)
    for index in range(3):
        made.submit(asked(index, LONG))
    made.submit(asked(3, (7, 8)))
    assert indices(placed(made)) == [0, 3]  # it goes past those that need no room yet
    num_read = 0
    while len(LONG) - 1 - num_read > module._SHARED:
        assert placed(made) == []
        for part in made.parts():
            made.read(part)
        num_read = made.reading[0].num_read
    copies = placed(made)
    assert [(p.request.index, p.source, p.num_shared) for p in copies] == [
        (1, 0, num_read),
        (2, 0, num_read),
    ]


def test_short_prompts_do_not_wait_for_each_other() -> None:
    made = Scheduler[Asked](max_rows=3, keeps=True)
    for index in range(3):
        made.submit(asked(index, range(module._SHARED + 1)))
    assert indices(placed(made)) == [0, 1, 2]


def test_a_cancelled_reader_lets_those_go_that_waited_for_it() -> None:
    made = Scheduler[Asked](max_rows=2, keeps=True, chunk=8)
    made.submit(asked(0, LONG))
    made.submit(asked(1, LONG))
    assert indices(placed(made)) == [0]
    for part in made.parts():
        made.read(part)
    made.finish(0, list(LONG[:8]))
    assert [(p.row, p.source, p.num_shared) for p in placed(made)] == [(0, 0, 7)]


# ---- what is read next ---------------------------------------------------------------------------


def test_the_oldest_prompt_gets_half_and_the_shortest_ones_the_rest() -> None:
    made = Scheduler[Asked](max_rows=4, chunk=16)
    for index, count in enumerate((100, 30, 3, 4)):
        made.submit(asked(index, range(count)))
    placed(made)
    assert made.parts() == [Part(0, 0, 8), Part(2, 0, 3), Part(3, 0, 4), Part(1, 0, 1)]
    for part in made.parts():
        assert made.read(part) == (part.row in (2, 3))
    assert made.parts() == [Part(0, 8, 16), Part(1, 1, 9)]


def test_one_prompt_alone_gets_the_whole_chunk() -> None:
    made = Scheduler[Asked](chunk=16)
    made.submit(asked(0, range(100)))
    placed(made)
    assert made.parts() == [Part(0, 0, 16)]


def check_parts(made: Scheduler[Asked]) -> None:
    parts = made.parts()
    assert len({part.row for part in parts}) == len(parts)
    assert sum(part.end - part.start for part in parts) <= made.chunk
    wanted = sum(own.num_left for own in made.reading.values())
    assert sum(part.end - part.start for part in parts) == min(made.chunk, wanted)
    if parts:
        oldest = next(iter(made.reading))
        own = made.reading[oldest]
        (first,) = [part for part in parts if part.row == oldest]
        assert first.end - first.start >= min(own.num_left, max(made.chunk // 2, 1))
    for part in parts:
        own = made.reading[part.row]
        assert own.num_read == part.start < part.end <= len(own.request.prompt)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_every_prompt_comes_to_its_end(chunk: int) -> None:
    luck = random.Random(chunk)
    made = Scheduler[Asked](max_rows=5, chunk=chunk)
    for index in range(12):
        made.submit(asked(index, range(luck.randint(1, 50))))
    ends = []
    for _ in range(400):
        placed(made)
        check_parts(made)
        for part in made.parts():
            if made.read(part):
                ends.append(made.running[part.row].index)
                finished(made, part.row)
    assert sorted(ends) == list(range(12))
    assert not made.has_work


# ---- leaving -------------------------------------------------------------------------------------


def test_a_request_can_leave_from_everywhere() -> None:
    made = Scheduler[Asked](max_rows=2, keeps=True, chunk=1)
    for index in range(3):
        made.submit(asked(index, (10 * index + 1, 10 * index + 2)))
    placed(made)
    for _ in range(2):
        for part in made.parts():
            made.read(part)
    assert list(made.running) == [0]
    assert list(made.reading) == [1]
    assert (made.row_of(0), made.row_of(1), made.row_of(2), made.row_of(9)) == (0, 1, None, None)
    made.withdraw(2)
    made.withdraw(9)
    assert not made.waiting
    made.finish(1, [])
    made.finish(0, [1, 2])
    assert (made.num_free, list(made.kept)) == (2, [0])
    assert not made.has_work


# ---- anything in any order -----------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Requests come, are read, run and leave; behind every rule all that is promised holds."""

    make: Callable[..., Scheduler[Asked]] = Scheduler

    @initialize(
        rows=st.integers(1, 4),
        spare=st.integers(0, 2),
        keeps=st.booleans(),
        room=st.sampled_from((None, 60, 90, 200)),
        chunk=st.sampled_from((1, 3, 7, 64)),
    )
    def begin(self, rows: int, spare: int, keeps: bool, room: int | None, chunk: int) -> None:
        make = type(self).make
        self.made = make(max_rows=rows, keeps=keeps, max_tokens=room, chunk=chunk, spare=spare)
        self.num_asked = 0
        self.open: set[int] = set()
        self.order: list[int] = []

    @rule(
        head=st.sampled_from(((), (1, 2, 3), LONG, LONG[:20])),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=6),
        new=st.integers(1, 8),
        owner=st.sampled_from(OWNERS),
        shares=st.booleans(),
    )
    def submit(
        self, head: tuple[int, ...], tail: list[int], new: int, owner: str, shares: bool
    ) -> None:
        request = asked(self.num_asked, (*head, *tail), new=new, owner=owner, shares=shares)
        self.num_asked += 1
        self.made.submit(request)
        self.open.add(request.index)

    @rule()
    def step(self) -> None:
        """As the engine does."""
        texts = {row: list(own.tokens) for row, own in self.made.kept.items()}
        owners = {row: own.owner for row, own in self.made.kept.items()}
        ran = dict(self.made.running)
        front = self.made.waiting[0] if self.made.waiting else None
        while placement := self.made.place():
            self.check_placement(placement, texts, owners)
            request = placement.request
            request.history = list(request.prompt)
            self.made.resumed(placement.row, placement.num_shared)
            texts.pop(placement.row, None)
        if front is not None and not self.made.requests():
            raise AssertionError("all rows are free and nobody gets one")
        self.made.crowded_out()

        check_parts(self.made)
        for part in self.made.parts():
            if self.made.read(part):
                self.made.running[part.row].history.append(part.end)
        for row, request in ran.items():
            request.history.append(len(request.history) % 3)
            if len(request.history) >= request.most_tokens:
                self.leave(row)

    def check_placement(
        self,
        placement: Placement[Asked],
        texts: dict[int, list[int]],
        owners: dict[int, str],
    ) -> None:
        request, row, source, count = placement
        assert count < len(request.prompt)
        if source is None:
            assert count == 0
            return
        assert self.made.keeps
        assert request.shares
        donors = self.made.requests()
        if source in texts:
            text, owner = texts[source], owners[source]
        else:
            text, owner = self.donor(source)
        assert owner == request.owner
        assert text[:count] == request.prompt[:count]
        assert row == source or row not in set(donors) - {row}

    def donor(self, source: int) -> tuple[list[int], str]:
        """What a row in use holds."""
        request = self.made.requests()[source]
        if source in self.made.reading:
            return request.prompt[: self.made.reading[source].num_read], request.owner
        return request.history[:-1], request.owner

    def leave(self, row: int) -> None:
        request = self.made.requests()[row]
        self.open.remove(request.index)
        is_read = row in self.made.running
        held = request.history[:-1] if is_read else self.made.reading[row].request.prompt
        if not is_read:
            held = held[: self.made.reading[row].num_read]
        self.made.finish(row, held if self.made.keeps else [])
        self.made.crowded_out()

    @precondition(lambda self: bool(self.open))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.open)))
        self.made.withdraw(index)
        row = self.made.row_of(index)
        if row is None:
            self.open.remove(index)
        else:
            self.leave(row)

    @invariant()
    def every_row_is_in_one_place(self) -> None:
        if not hasattr(self, "made"):
            return
        rows = [*self.made.reading, *self.made.running, *self.made.kept]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(self.made.num_rows))
        assert len(self.made.requests()) <= self.made.max_rows
        assert self.made.num_free == self.made.max_rows - len(self.made.requests())
        if self.made.max_tokens is not None:
            assert self.made.num_promised + self.made.num_kept <= self.made.max_tokens
        inside = [request.index for request in self.made.requests().values()]
        waiting = [request.index for request in self.made.waiting]
        assert sorted(inside + waiting) == sorted(self.open)
        assert waiting == sorted(waiting)

    def teardown(self) -> None:
        """Everybody comes to an end."""
        if not hasattr(self, "made"):
            return
        for _ in range(2000):
            if not self.made.has_work:
                break
            self.step()
            self.every_row_is_in_one_place()
        assert not self.made.has_work, "somebody waits for ever"
        assert not self.open


def explored(make: Callable[..., Scheduler[Asked]] = Scheduler, *, examples: int = 40) -> None:
    machine = type("Explored", (Machine,), {"make": staticmethod(make)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_comes_in_whatever_order_all_that_is_promised_holds() -> None:
    explored()


class SharesWithEverybody(Scheduler[Asked]):
    def _held(self, owner: str) -> Iterator[tuple[int, Sequence[int], int]]:
        for own in OWNERS:
            yield from super()._held(own)


class TakesWhatIsNotRead(Scheduler[Asked]):
    def _held(self, owner: str) -> Iterator[tuple[int, Sequence[int], int]]:
        for row, tokens, _ in super()._held(owner):
            yield row, tokens, len(tokens)


class TakesTheWholePrompt(Scheduler[Asked]):
    def _longest_match(self, request: Asked) -> Any:
        match = super()._longest_match(request)
        return match._replace(num_shared=match.num_shared + (match.row is not None))


class ForgetsWhatIsKept(Scheduler[Asked]):
    def _is_crowded(self) -> bool:
        return self.max_tokens is not None and self.num_kept > self.max_tokens


class PromisesTooMuch(Scheduler[Asked]):
    def _fits(self, request: Asked) -> bool:
        return self.max_tokens is None or self.num_promised < self.max_tokens


class LetsOthersOvertake(Scheduler[Asked]):
    def place(self) -> Placement[Asked] | None:
        for _ in range(len(self.waiting)):
            if placement := super().place():
                return placement
            self.waiting.rotate(-1)
        return None


class StarvesTheOldest(Scheduler[Asked]):
    def parts(self) -> list[Part]:
        parts = super().parts()
        return [part for part in parts if part.row != next(iter(self.reading))] or parts


class TakesAnybodysRow(Scheduler[Asked]):
    def _row_for(self, match: Any) -> int:
        return 0


FAULTS = (
    SharesWithEverybody,
    TakesWhatIsNotRead,
    TakesTheWholePrompt,
    ForgetsWhatIsKept,
    PromisesTooMuch,
    LetsOthersOvertake,
    StarvesTheOldest,
    TakesAnybodysRow,
)


@pytest.mark.parametrize("faulty", FAULTS)
def test_a_planted_fault_is_found(faulty: type[Scheduler[Asked]]) -> None:
    with pytest.raises((AssertionError, KeyError, ExceptionGroup)):
        explored(faulty, examples=150)


# ---- the length of a common beginning ------------------------------------------------------------


def test_a_common_beginning_is_measured_exactly() -> None:
    luck = random.Random(0)
    for _ in range(500):
        left = [luck.randrange(2) for _ in range(luck.randint(0, 12))]
        right = [luck.randrange(2) for _ in range(luck.randint(0, 12))]
        if luck.random() < 0.5:
            right = left + right
        same = 0
        while same < min(len(left), len(right)) and left[same] == right[same]:
            same += 1
        assert module._num_shared(left, right) == same
        assert module._num_shared(right, left) == same


def test_a_part_is_as_long_as_the_pause_allows() -> None:
    made = Scheduler[Asked](2, chunk=64, pause=0.1)
    made.took(64, 0.4)  # too long: at once
    assert made.chunk == 16
    made.took(16, 0.2)
    assert made.chunk == 16  # no less than this is worth a pass
    for chunk in (32, 64, 112):
        made.took(made.chunk, 0.03)  # time is left: in steps
        assert made.chunk == chunk
    made.took(112, 0.08)
    made.took(3, 0.02)  # the end of a prompt says nothing
    made.took(400, 0.9)  # nor what was read while nobody waited
    assert made.chunk == 112
    for _ in range(9):
        made.took(made.chunk, 0.01)
    assert made.chunk == 512


def test_a_part_without_a_clock_stays_as_it_is() -> None:
    made = Scheduler[Asked](2, chunk=64)
    made.took(64, 9.0)
    assert made.chunk == 64


def test_a_prompt_that_nobody_waits_beside_is_read_in_longer_parts() -> None:
    made = Scheduler[Asked](2, chunk=16, pause=0.1)
    made.submit(asked(0, tuple(range(1000))))
    placed(made)
    assert [part.end - part.start for part in made.parts()] == [512]
    made.submit(asked(1, (5,)))
    placed(made)
    (short,) = [part for part in made.parts() if part.row == 1]
    made.read(short)  # it runs, and waits for its next token
    assert [part.end - part.start for part in made.parts()] == [16]
