"""The slot cache against lists: whatever was written, kept, cut, freed and grown, a row holds what
was committed to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashdraft.models.cache import SLOT_STEP, SlotCache

ROWS, SHAPES = 3, ((2, 3), (1, 5))  # heads and head size of each layer

Op = tuple[str, int, int, tuple[int, ...]]  # what, row, how many, which


@st.composite
def operations(draw: st.DrawFn) -> list[Op]:
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, 12))):
        count = draw(st.integers(1, 9))
        path = draw(st.sets(st.integers(0, count - 1)))
        what = draw(st.sampled_from(("step", "step", "step", "cut", "free", "reserve")))
        ops.append((what, draw(st.integers(0, ROWS - 1)), count, tuple(sorted(path))))
    return ops


class Row:
    """One row's committed entries, kept the slow way: a list, one number per slot."""

    def __init__(self) -> None:
        self.entries: list[int] = []


def entry(number: int, layer: int) -> tuple[Tensor, Tensor]:
    """A key and a value that no other slot and layer has: [heads, 1, head_dim] each."""
    heads, size = SHAPES[layer]
    key = 100.0 * number + 10 * layer + torch.arange(heads * size).view(heads, 1, size) / 64
    return key, -key


def write(cache: SlotCache, row: int, numbers: Sequence[int]) -> None:
    for layer in range(len(SHAPES)):
        keys, values = zip(*(entry(number, layer) for number in numbers), strict=True)
        cache.write(layer, row, torch.cat(keys, 1), torch.cat(values, 1))


def check_against_lists(cache: SlotCache, ops: Sequence[Op]) -> None:
    rows, number = [Row() for _ in range(ROWS)], 0
    for what, row, count, path in ops:
        own = rows[row].entries
        if what == "step":
            cache.reserve(len(own) + count)
            numbers = list(range(number, number + count))
            number += count
            write(cache, row, numbers)
            cache.keep(row, path)
            own += [numbers[node] for node in path]
        elif what == "cut":
            cache.lengths[row] = min(count, len(own))
            del own[count:]
        elif what == "free":
            cache.free(row)
            own.clear()
        else:
            cache.reserve(SLOT_STEP * count)
        for r, wanted in enumerate(rows):
            assert cache.lengths[r] == len(wanted.entries)
            for layer in range(len(SHAPES)):
                keys, values = cache.keys[layer], cache.values[layer]
                if keys is None or values is None or not wanted.entries:
                    continue
                held = slice(0, len(wanted.entries))
                pairs = [entry(n, layer) for n in wanted.entries]
                if (
                    cache.blocked
                ):  # [rows, heads, blocks, head_dim, 64] -> [rows, heads, slots, head_dim]
                    keys = keys.transpose(-1, -2).flatten(2, 3)
                assert torch.equal(keys[r, :, held], torch.cat([key for key, _ in pairs], 1))
                assert torch.equal(values[r, :, held], torch.cat([value for _, value in pairs], 1))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ops=operations(), blocked=st.booleans())
def test_a_row_holds_what_was_committed_to_it(ops: list[Op], blocked: bool) -> None:
    check_against_lists(SlotCache(len(SHAPES), ROWS, 8, blocked=blocked), ops)


class KeepsTheWholeDraft(SlotCache):
    def keep(self, row: int, path: Sequence[int]) -> None:
        super().keep(row, range(max(path, default=-1) + 1))


class LeavesThePathWhereItIs(SlotCache):
    def keep(self, row: int, path: Sequence[int]) -> None:
        super().keep(row, range(len(path)))


class MovesKeysOnly(SlotCache):
    def keep(self, row: int, path: Sequence[int]) -> None:
        values = [None if v is None else v.clone() for v in self.values]
        super().keep(row, path)
        self.values = values


class FreesNothing(SlotCache):
    def free(self, row: int) -> None:
        pass


class GrowsEmpty(SlotCache):
    def reserve(self, slots: int, rows: int = 0) -> None:
        old = self.slots
        super().reserve(slots, rows)
        if self.slots != old:
            self.keys = [None if k is None else torch.zeros_like(k) for k in self.keys]


class MovesInPlace(SlotCache):
    """Copies slot by slot from the end, over sources that are still needed."""

    def keep(self, row: int, path: Sequence[int]) -> None:
        start = self.lengths[row]
        for tensor in (*self.keys, *self.values):
            for to in reversed(range(len(path))):
                if tensor is not None:
                    tensor[row, :, start + to] = tensor[row, :, start + path[to]]
        self.lengths[row] = start + len(path)


FAULTS = (
    KeepsTheWholeDraft,
    LeavesThePathWhereItIs,
    MovesKeysOnly,
    FreesNothing,
    GrowsEmpty,
    MovesInPlace,
)
EVERYTHING: list[Op] = [
    ("step", 0, 3, (0, 1, 2)),
    ("step", 0, 6, (0, 2, 3, 5)),
    ("step", 1, 4, (0,)),
    ("step", 1, 4, (0, 3)),
    ("free", 0, 1, ()),
    ("step", 0, 2, (0, 1)),
    ("reserve", 0, 2, ()),
]


@pytest.mark.parametrize("faulty", FAULTS)
@pytest.mark.parametrize("blocked", [False, True])
def test_a_planted_fault_is_caught(faulty: type[SlotCache], blocked: bool) -> None:
    check_against_lists(SlotCache(len(SHAPES), ROWS, 8, blocked=blocked), EVERYTHING)
    with pytest.raises((AssertionError, IndexError)):
        check_against_lists(faulty(len(SHAPES), ROWS, 8, blocked=blocked), EVERYTHING)


def test_a_path_may_be_kept_outside_of_the_inference_mode_that_wrote_it() -> None:
    cache = SlotCache(len(SHAPES), 1, 8)
    with torch.inference_mode():
        write(cache, 0, [5, 6, 7])
    cache.keep(0, [0, 2])
    assert cache.keys[0] is not None
    assert torch.equal(cache.keys[0][0, :, 1:2], entry(7, 0)[0])


def test_a_write_leaves_the_length() -> None:
    cache = SlotCache(1, 2, 8)
    write_one = torch.full((2, 3, 4), 7.0)
    cache.write(0, 1, write_one, -write_one)
    assert cache.lengths == [0, 0]
    keys, values = cache.layer(0, write_one)
    assert keys.shape == values.shape == (2, 2, SLOT_STEP, 4)
    assert torch.equal(keys[1, :, :3], write_one)
    assert torch.equal(values[1, :, :3], -write_one)


def test_the_next_write_goes_over_what_was_not_kept() -> None:
    cache = SlotCache(len(SHAPES), 1, 8)
    write(cache, 0, [1, 2, 3])
    cache.keep(0, [0])
    write(cache, 0, [9])
    assert cache.keys[1] is not None
    assert torch.equal(cache.keys[1][0, :, 1:2], entry(9, 1)[0])


def test_slots_come_in_steps_and_never_go() -> None:
    cache = SlotCache(1, 1, 1)
    assert cache.slots == SLOT_STEP
    cache.reserve(SLOT_STEP)
    assert cache.slots == SLOT_STEP
    cache.reserve(SLOT_STEP + 1)
    assert cache.slots == 2 * SLOT_STEP
    cache.reserve(2 * SLOT_STEP + 1)
    assert (
        cache.slots == 4 * SLOT_STEP
    )  # doubled: a text that grows by one is not copied at every token
    cache.reserve(1, rows=5)
    assert (cache.slots, cache.rows, cache.lengths) == (4 * SLOT_STEP, 5, [0] * 5)
    cache.reserve(20 * SLOT_STEP)
    assert cache.slots == 20 * SLOT_STEP


def test_new_rows_start_empty_beside_the_old_ones() -> None:
    cache = SlotCache(len(SHAPES), 1, 8)
    write(cache, 0, [4])
    cache.keep(0, [0])
    cache.reserve(0, rows=3)
    write(cache, 2, [8])
    cache.keep(2, [0])
    assert cache.lengths == [1, 0, 1]
    assert cache.keys[0] is not None
    assert torch.equal(cache.keys[0][0, :, :1], entry(4, 0)[0])
    assert torch.equal(cache.keys[0][2, :, :1], entry(8, 0)[0])


def test_bytes_are_counted_as_they_are_held() -> None:
    cache = SlotCache(2, 3, 8)
    assert cache.nbytes == 0
    cache.write(0, 0, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    assert cache.nbytes == 2 * (3 * 2 * SLOT_STEP * 4) * 4
    cache.write(
        1, 0, torch.zeros(1, 1, 8, dtype=torch.float64), torch.zeros(1, 1, 8, dtype=torch.float64)
    )
    assert cache.nbytes == 2 * (3 * 2 * SLOT_STEP * 4) * 4 + 2 * (3 * SLOT_STEP * 8) * 8


# ---- rows that begin as others did, and room that comes and goes --------------------------------

LARGE = (2, 32)  # heads and head size of caches that lie in maps


def large(blocked: bool, rows: int = 3, slots: int = 2048) -> SlotCache:
    cache = SlotCache(1, rows, slots, blocked=blocked)
    fill(cache, 0, 0, 0)
    assert len(cache._maps) == 2
    return cache


def numbers(seed: int, count: int) -> Tensor:
    heads, size = LARGE
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, count, size, generator=generator)


def fill(cache: SlotCache, row: int, seed: int, count: int) -> None:
    keys = numbers(seed, count)
    cache.write(0, row, keys, -keys)
    cache.keep(row, range(count))


def held(cache: SlotCache, row: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row, as they were written."""
    keys, values = cache.keys[0], cache.values[0]
    assert keys is not None
    assert values is not None
    if cache.blocked:
        keys = keys.transpose(-1, -2).flatten(2, 3)
    length = cache.lengths[row]
    return keys[row, :, :length], values[row, :, :length]


def check_held(cache: SlotCache, row: int, seed: int, count: int, *, whole: int) -> None:
    """It holds the first `count` of what `fill` wrote, `whole` numbers in all."""
    wanted = numbers(seed, whole)[:, :count]
    keys, values = held(cache, row)
    assert torch.equal(keys, wanted)
    assert torch.equal(values, -wanted)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 100])
def test_a_row_takes_what_another_holds_and_leaves_it(blocked: bool, count: int) -> None:
    cache = large(blocked)
    fill(cache, 1, 5, 100)
    fill(cache, 2, 6, 130)
    cache.take(2, 1, count)
    check_held(cache, 1, 5, 100, whole=100)
    check_held(cache, 2, 5, count, whole=100)
    cache.take(1, 1, count)
    check_held(cache, 1, 5, count, whole=100)
    with pytest.raises(AssertionError, match="more than it holds"):
        cache.take(2, 1, count + 1)


def test_a_row_that_is_new_to_a_cache_can_be_resumed() -> None:
    cache = large(True, rows=1, slots=4096)
    fill(cache, 0, 5, 70)
    assert cache.resume(3, 0, 66) == 66
    assert cache.resume(1, 0, 900) == 70
    assert cache.resume(2, 4, 9) == 0
    assert cache.lengths == [70, 70, 0, 66, 0]
    check_held(cache, 3, 5, 66, whole=70)


@pytest.mark.parametrize("blocked", [False, True])
def test_large_caches_grow_and_keep_what_is_held(blocked: bool) -> None:
    cache = large(blocked, slots=2048)
    counts = (1, 1000, 2048)
    for row, count in enumerate(counts):
        fill(cache, row, row, count)
    cache.reserve(2049, rows=5)
    assert (cache.rows, cache.slots, len(cache._maps)) == (5, 4096, 2)
    for row, count in enumerate(counts):
        check_held(cache, row, row, count, whole=count)
    fill(cache, 4, 9, 4096)
    check_held(cache, 4, 9, 4096, whole=4096)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("slots", [2048, 2112])
def test_room_that_is_given_back_is_zeros_and_the_neighbours_stay(
    blocked: bool, slots: int
) -> None:
    """Also where rows end within a page of memory."""
    cache = large(blocked, rows=4, slots=slots)
    for row in range(4):
        fill(cache, row, row, slots)
    cache.free(1)
    cache.give_back(1)
    cache.wipe(1)
    assert all(not bool(tensor[1].any()) for tensor in cache._tensors())
    for row in (0, 2, 3):
        check_held(cache, row, row, slots, whole=slots)
    fill(cache, 1, 7, slots)
    check_held(cache, 1, 7, slots, whole=slots)
    with pytest.raises(AssertionError, match="not free"):
        cache.give_back(1)


def test_a_wiped_row_holds_nothing_that_is_no_number() -> None:
    for slots in (64, 2112):
        cache = SlotCache(1, 3, slots, blocked=True)
        fill(cache, 0, 0, 1)
        for tensor in cache._tensors():
            tensor.fill_(torch.nan)
        cache.wipe(1)
        for tensor in cache._tensors():
            assert not bool(tensor[1].any())
            assert bool(tensor[0].isnan().all())
            assert bool(tensor[2].isnan().all())


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("good", range(4))
def test_a_cache_that_cannot_grow_stays_as_it_was(
    blocked: bool, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`good` of its tensors have grown when memory is gone; the kernels must find all of a size."""
    cache = SlotCache(2, 2, 2048, blocked=blocked)
    for layer in range(2):
        cache.write(layer, 1, numbers(3, 90), -numbers(3, 90))
    cache.keep(1, range(90))
    shapes = [tensor.shape for tensor in cache._tensors()]
    right = SlotCache._zeros
    left = [good]

    def fails(self: SlotCache, like: Tensor, *shape: int) -> Tensor:
        left[0] -= 1
        if left[0] == -1:
            raise MemoryError
        return right(self, like, *shape)

    cache.addresses = ["of what lies there now"]
    with monkeypatch.context() as patch:
        patch.setattr(SlotCache, "_zeros", fails)
        with pytest.raises(MemoryError):
            cache.reserve(2049, rows=3)
    assert (cache.rows, cache.slots, cache.lengths) == (2, 2048, [0, 90])
    assert [tensor.shape for tensor in cache._tensors()] == shapes
    assert cache.addresses is None
    assert cache._maps.keys() == {id(tensor) for tensor in cache._tensors()}
    check_held(cache, 1, 3, 90, whole=90)
    cache.reserve(2049, rows=3)
    assert (cache.rows, cache.slots) == (3, 4096)
    check_held(cache, 1, 3, 90, whole=90)
