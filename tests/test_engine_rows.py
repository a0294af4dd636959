"""Rows of the engine come and go: each writes what it would write alone and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import admit, requests_of, tiny_drafter
from toy_engine import (
    CHOSEN,
    GREEDY,
    METHODS,
    NEW,
    PROMPTS,
    SAMPLED,
    Recording,
    Tree,
    made,
    plain,
    run,
)

from flashdraft.engine import Engine
from flashdraft.models.cache import SlotCache
from flashdraft.types import SamplingParams

CROWD = (*PROMPTS, (33, 4), tuple(range(50, 20, -2)))
LIMITS = (14, 3, 9, 1, 12)


def crowd_params() -> list[SamplingParams]:
    return [
        replace(params, max_new_tokens=limit)
        for params, limit in zip((GREEDY, *SAMPLED, GREEDY), LIMITS, strict=True)
    ]


def check_crowd(method: str, rows: int, rounds: int = 1) -> None:
    params = crowd_params()
    wanted = [plain("llama", prompt, own) for prompt, own in zip(CROWD, params, strict=True)]
    drafter = METHODS[method](made("llama"), [p + t for p, t in zip(CROWD, wanted, strict=True)], 4)
    engine = Engine(made("llama"), drafter, max_rows=rows)
    for _ in range(rounds):
        results = run(engine, requests_of(CROWD, params))
        assert [result.tokens for result in results] == wanted
        assert all(cache.lengths == [0] * cache.rows for cache in drafter.caches)


@pytest.mark.parametrize("method", CHOSEN)
def test_rows_that_join_and_leave_write_what_they_write_alone(method: str) -> None:
    check_crowd(method, rows=2)


@pytest.mark.parametrize("method", CHOSEN)
def test_a_used_engine_writes_what_a_fresh_one_writes(method: str) -> None:
    check_crowd(method, rows=3, rounds=3)


@pytest.mark.parametrize("method", METHODS)
def test_no_proposal_is_larger_than_what_may_still_be_written(method: str) -> None:
    texts = [prompt + plain("llama", prompt) for prompt in PROMPTS]
    drafter = Recording(METHODS[method](made("llama"), texts, 7))
    run(Engine(made("llama"), drafter, max_rows=3), requests_of(PROMPTS, (GREEDY,) * 3))
    assert drafter.proposals


def check_used_drafter() -> None:
    """A text is right whatever drafts; that a used drafter is as good as a new one shows in its
    proposals.
    """
    drafter = Recording(tiny_drafter(made("llama")))
    engine = Engine(made("llama"), drafter)
    run(engine, requests_of([PROMPTS[2]], [GREEDY]))
    for prompt in PROMPTS:
        drafter.proposals.clear()
        run(engine, requests_of([prompt], [GREEDY]))
        fresh = Recording(tiny_drafter(made("llama")))
        run(Engine(made("llama"), fresh), requests_of([prompt], [GREEDY]))
        assert drafter.proposals == fresh.proposals


def test_a_used_drafter_proposes_what_a_fresh_one_proposes() -> None:
    check_used_drafter()


def keep_the_first_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotCache, "free", lambda self, row: self.lengths.__setitem__(row, 1))


@pytest.mark.parametrize(
    "check",
    [lambda: check_crowd("cheater", 2), lambda: check_crowd("dflash", 2), check_used_drafter],
)
def test_a_row_that_is_not_freed_is_caught(
    check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_the_first_slot(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_a_drafter_that_does_not_forget_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_drafter(made("llama"))), "end", lambda self, rows: None)
    with pytest.raises(AssertionError):
        check_used_drafter()


def test_the_caches_grow_while_rows_run() -> None:
    """The first row's slots move when a prompt comes that is longer than all of them."""
    long = tuple(3 + i * i % 50 for i in range(220))
    params = [GREEDY, replace(GREEDY, max_new_tokens=36)]
    engine = Engine(made("llama"), tiny_drafter(made("llama")), max_rows=2)
    short, late = requests_of([PROMPTS[0], long], params)
    chunks = [admit(engine, short), *engine.step()]
    before = engine._cache.slots
    admit(engine, late)
    assert engine._cache.slots > before
    while engine.running:
        chunks += engine.step()
    tokens = {
        index: tuple(token for c in chunks if c.index == index for token in c.tokens)
        for index in (0, 1)
    }
    assert tokens[0] == plain("llama", PROMPTS[0])
    assert tuple(late.history[len(long) :]) == plain("llama", long, params[1])


@pytest.mark.parametrize("method", ["cheater", "dflash"])
def test_an_aborted_row_is_free_at_once_and_leaves_the_others_alone(method: str) -> None:
    texts = [prompt + plain("llama", prompt) for prompt in PROMPTS]
    drafter = METHODS[method](made("llama"), texts, 4)
    engine = Engine(made("llama"), drafter, max_rows=2)
    gone, stays, comes = requests_of(PROMPTS, (GREEDY,) * 3)
    for request in (gone, stays):
        admit(engine, request)
    engine.step()
    engine.cancel(77)  # nobody's number
    assert engine.num_free == 0
    engine.cancel(gone.index)
    assert engine.num_free == 1
    assert engine._cache.lengths[0] == 0
    assert all(cache.lengths[0] == 0 for cache in drafter.caches)
    admit(engine, comes)
    while engine.running:
        assert gone.index not in [chunk.index for chunk in engine.step()]
    for request, prompt in ((stays, PROMPTS[1]), (comes, PROMPTS[2])):
        assert tuple(request.history[len(prompt) :]) == plain("llama", prompt)
    assert len(gone.history) < len(PROMPTS[0]) + NEW
    engine.cancel(stays.index)  # finished already


@pytest.mark.parametrize("where", ["observe", "propose"])
def test_a_failure_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admission that fails frees its row; a step that fails can be run again."""
    drafter = tiny_drafter(made("llama"))
    engine = Engine(made("llama"), drafter, max_rows=2)
    first, second = requests_of(PROMPTS[:2], (GREEDY,) * 2)
    admit(engine, first)

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(drafter), where, fails)
        with pytest.raises(MemoryError):
            admit(engine, second) if where == "observe" else engine.step()
    assert engine._cache.lengths == [len(PROMPTS[0]), 0]
    assert drafter.cache.lengths[1:] in ([], [0])
    admit(engine, requests_of(PROMPTS[1:2], [GREEDY], first=1)[0])
    rows = dict(engine.running)
    while engine.running:
        engine.step()
    for row, prompt in enumerate(PROMPTS[:2]):
        assert tuple(rows[row].history[len(prompt) :]) == plain("llama", prompt)


@pytest.mark.parametrize("name", ["llama", "lean llama"])
def test_a_wide_proposal_beside_a_long_row_finds_room(name: str) -> None:
    long = tuple(3 + i * i % 50 for i in range(184))
    params = [replace(GREEDY, max_new_tokens=5), replace(GREEDY, max_new_tokens=100)]
    texts = [prompt + plain(name, prompt) for prompt in (long, PROMPTS[0])]
    results = run(
        Engine(made(name), Tree(texts, block_size=99), max_rows=2),
        requests_of([long, PROMPTS[0]], params),
    )
    assert results[0].tokens == plain(name, long)[:5]
    assert results[1].tokens[:NEW] == plain(name, PROMPTS[0])
