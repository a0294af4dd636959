"""The engine thread and its streams, without HTTP: who is admitted, who hears what, who is
freed.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from toy_server import LONG, Knobs, toy_model

from flashdraft.engine import Engine, Request
from flashdraft.errors import ModelNotFound
from flashdraft.generate import Model
from flashdraft.serve.worker import (
    Draining,
    EngineFault,
    Limits,
    NotReady,
    Overloaded,
    Stream,
    TimedOut,
    TooManyAnswers,
    TooSlow,
    Worker,
)
from flashdraft.types import Result, SamplingParams

MODEL = toy_model()
PROMPTS = ("abcd", "hello there", "x", "a longer one, with words")
SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)
WHOLE = SamplingParams(max_new_tokens=LONG, ignore_eos=True)
MIDDLE = replace(WHOLE, max_new_tokens=40)
Body = Callable[[Worker, Knobs], Awaitable[None]]


def requests(*prompts: str, params: SamplingParams = SHORT) -> list[Request]:
    return [MODEL.request(prompt, params) for prompt in prompts]


def run(
    body: Body, limits: Limits | None = None, load: Callable[[], Model] = lambda: MODEL
) -> None:
    """The body, on a loop of its own, with a worker that is ready."""

    async def inside() -> None:
        knobs = Knobs()
        own = limits or Limits(max_rows=2, queue=4)
        worker = Worker(load, own, new_engine=knobs.new_engine(own.max_rows))
        worker.start()
        try:
            await soon(lambda: worker.state != "loading")
            await body(worker, knobs)
        finally:
            knobs.open.set()
            assert await worker.stop()

    asyncio.run(inside())


async def soon(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


async def results(stream: Stream) -> list[Result]:
    """Every result of a call, in the order of its requests."""
    found = {}
    async for chunk in stream:
        if chunk.result is not None:
            found[chunk.index] = chunk.result
    return [found[index] for index in sorted(found)]


async def answered(worker: Worker, *prompts: str, params: SamplingParams = SHORT) -> list[Result]:
    async with worker.reserve(len(prompts)) as stream:
        stream.submit(requests(*prompts, params=params))
        return await results(stream)


def alone(*prompts: str, params: SamplingParams = SHORT) -> list[tuple[int, ...]]:
    return [MODEL.generate(prompt, params).tokens for prompt in prompts]


def is_free(worker: Worker, knobs: Knobs) -> bool:
    return worker.is_idle and not knobs.engines[-1].has_work


# --- texts ----------------------------------------------------------------------------------------


def test_a_text_is_that_of_the_model_alone_whoever_runs_beside_it() -> None:
    sampled = replace(SHORT, temperature=0.9, seed=5)

    async def body(worker: Worker, knobs: Knobs) -> None:
        calls = [answered(worker, *PROMPTS[:2]), answered(worker, PROMPTS[2], params=sampled)]
        calls.append(answered(worker, PROMPTS[3]))
        both, one, last = await asyncio.gather(*calls)
        assert [result.tokens for result in both] == alone(*PROMPTS[:2])
        assert [result.tokens for result in one] == alone(PROMPTS[2], params=sampled)
        assert [result.tokens for result in last] == alone(PROMPTS[3])
        await soon(lambda: is_free(worker, knobs))

    run(body)


def test_the_chunks_of_a_stream_make_its_text() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        stream = worker.reserve()
        stream.submit(requests(PROMPTS[1]))
        chunks = [chunk async for chunk in stream]
        result = chunks[-1].result
        assert result is not None
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert len(chunks) > 1
        assert {chunk.index for chunk in chunks} == {0}
        stream.close()

    run(body)


# --- admission ------------------------------------------------------------------------------------


def test_as_many_are_admitted_as_there_are_places_and_no_more() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        streams = [worker.reserve() for _ in range(6)]
        with pytest.raises(Overloaded, match="6 requests run or wait, of 6 at most"):
            worker.reserve()
        streams.pop().close()
        worker.reserve().close()
        for stream in streams:
            stream.submit(requests(PROMPTS[0]))
        texts = [(await results(stream))[0].tokens for stream in streams]
        assert texts == alone(PROMPTS[0]) * 5
        assert is_free(worker, knobs)

    run(body)


def test_answers_that_no_server_could_hold_are_refused_as_such() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        with pytest.raises(TooManyAnswers, match="holds 6"):
            worker.reserve(7)
        with pytest.raises(TooManyAnswers):
            worker.reserve(10**9)
        worker.reserve(6).close()

    run(body)


def test_places_come_back_one_by_one_as_answers_end() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        stream = worker.reserve(6)
        first = requests(PROMPTS[0], params=replace(SHORT, max_new_tokens=1))
        stream.submit([*first, *requests(*PROMPTS[:1] * 5, params=WHOLE)])
        knobs.seconds = 0.01
        async for chunk in stream:
            if chunk.result is not None:
                break
        worker.reserve().close()
        stream.close()
        await soon(lambda: is_free(worker, knobs))

    run(body)


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.alone
def test_a_closed_stream_frees_its_row_within_a_step() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.01
        stream = worker.reserve()
        stream.submit(requests(PROMPTS[0], params=WHOLE))
        await anext(stream)
        stream.close()
        steps = knobs.steps
        await soon(lambda: is_free(worker, knobs), 0.2)
        assert knobs.steps <= steps + 2
        assert worker.metrics.cancelled.labels("gone")._value.get() == 1

    run(body)


@pytest.mark.alone
def test_a_worker_that_forgets_to_cancel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(worker: Worker, stream: Stream, numbers: list[int], reason: str) -> None:
        stream._have_left(len(numbers))

    monkeypatch.setattr(Worker, "_cancel", forgets)
    with pytest.raises(TimeoutError):
        test_a_closed_stream_frees_its_row_within_a_step()


def test_one_that_waits_for_a_row_can_leave_too() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        with knobs.held():
            streams = [worker.reserve() for _ in range(6)]
            for stream in streams:
                stream.submit(requests(PROMPTS[0]))
            streams.pop().close()
        await soon(lambda: worker._taken < 6)
        for stream in streams:
            assert (await results(stream))[0].tokens == alone(PROMPTS[0])[0]
        assert is_free(worker, knobs)

    run(body)


@pytest.mark.alone
def test_a_request_that_takes_too_long_ends_and_frees_its_row() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.02
        stream = worker.reserve()
        stream.submit(requests(PROMPTS[0], params=WHOLE))
        with pytest.raises(TimedOut, match=r"longer than 0\.2 seconds"):
            await results(stream)
        await soon(lambda: is_free(worker, knobs), 0.3)
        assert worker.metrics.cancelled.labels("timeout")._value.get() == 1
        stream.close()
        assert worker.is_idle

    run(body, Limits(max_rows=2, queue=4, timeout=0.2))


def test_a_stream_that_nobody_reads_is_dropped_and_its_neighbour_goes_on() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        slow = worker.reserve()
        slow.submit(requests(PROMPTS[0], params=MIDDLE))
        read = await answered(worker, PROMPTS[1], params=MIDDLE)
        assert [result.tokens for result in read] == alone(PROMPTS[1], params=MIDDLE)
        assert slow.overflowed.is_set()
        for _ in range(20):
            await anext(slow)
        with pytest.raises(TooSlow, match="20 chunks wait"):
            await anext(slow)
        slow.close()
        slow.close()
        await soon(lambda: is_free(worker, knobs))

    run(body, Limits(max_rows=2, queue=4, buffer=20))


def test_an_abort_ends_every_text_with_what_it_has() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.01
        stream = worker.reserve(3)
        stream.submit(requests(*PROMPTS[:3], params=MIDDLE))
        await anext(stream)
        worker.abort()
        ended = await results(stream)
        assert {result.finish_reason for result in ended} == {"abort"}
        expected = alone(*PROMPTS[:3], params=MIDDLE)
        for result, text in zip(ended, expected, strict=True):
            assert result.tokens == text[: len(result.tokens)]
            assert len(result.tokens) < 40
        assert ended[0].stats.num_prompt_tokens > 0
        assert is_free(worker, knobs)

    run(body)


def test_what_is_sent_behind_an_abort_ends_at_once() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        stream = worker.reserve()  # it is still being tokenised
        worker.drain()
        worker.abort()
        stream.submit(requests(PROMPTS[0], params=WHOLE))
        (ended,) = await results(stream)
        assert ended.finish_reason == "abort"
        assert ended.tokens == ()
        assert is_free(worker, knobs)

    run(body)


def test_a_request_that_breaks_every_engine_before_it_begins_fails_at_last() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.fault = MemoryError("planted")
        knobs.lasts = True
        async with worker.reserve() as stream:
            stream.submit(requests(PROMPTS[0]))
            with pytest.raises(EngineFault):
                await results(stream)
        knobs.lasts = False
        knobs.fault = None
        assert [result.tokens for result in await answered(worker, PROMPTS[0])] == alone(PROMPTS[0])
        assert len(knobs.engines) == 3

    run(body)


# --- faults ---------------------------------------------------------------------------------------


def test_a_fault_of_the_engine_fails_what_ran_and_the_rest_goes_on() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.01
        streams = [worker.reserve() for _ in range(4)]
        for stream, prompt in zip(streams, PROMPTS, strict=True):
            stream.submit(requests(prompt))
        await anext(streams[0])
        await anext(streams[1])
        knobs.fault = MemoryError("planted")
        for stream in streams[:2]:
            with pytest.raises(EngineFault):
                await results(stream)
        waited = [(await results(stream))[0].tokens for stream in streams[2:]]
        assert waited == alone(*PROMPTS[2:])
        assert len(knobs.engines) == 2
        after = await answered(worker, PROMPTS[0])
        assert [result.tokens for result in after] == alone(PROMPTS[0])
        assert is_free(worker, knobs)
        assert worker.is_ready

    run(body)


def test_an_engine_that_cannot_cancel_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine, index: int) -> None:
        raise MemoryError("planted")

    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.01
        stream = worker.reserve()
        stream.submit(requests(PROMPTS[0], params=WHOLE))
        await anext(stream)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "cancel", broken)
            stream.close()
            await soon(lambda: len(knobs.engines) == 2)
        after = await answered(worker, PROMPTS[0])
        assert [result.tokens for result in after] == alone(PROMPTS[0])
        assert is_free(worker, knobs)

    run(body)


def test_the_failed_engine_and_its_caches_are_gone() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.seconds = 0.01
        stream = worker.reserve()
        stream.submit(requests(PROMPTS[0]))
        await anext(stream)
        old = weakref.ref(knobs.engines.pop())
        knobs.fault = MemoryError("planted")
        with pytest.raises(EngineFault):
            await results(stream)
        await soon(lambda: old() is None)

    run(body)


def test_a_dead_thread_refuses_everything_and_leaves_nobody_waiting() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        knobs.fault = SystemExit(1)
        with knobs.held():
            streams = [worker.reserve() for _ in range(3)]
            for stream in streams:
                stream.submit(requests(PROMPTS[0]))
        for stream in streams:
            with pytest.raises(EngineFault, match="gone"):
                await results(stream)
            stream.close()
        assert worker.state == "dead"
        assert not worker.is_ready
        assert worker.is_idle
        with pytest.raises(NotReady, match="gone"):
            worker.reserve()

    run(body)


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    def nothing() -> Model:
        raise ModelNotFound("no such model")

    async def body(worker: Worker, knobs: Knobs) -> None:
        assert worker.state == "dead"
        assert isinstance(worker.failure, ModelNotFound)
        with pytest.raises(NotReady):
            worker.reserve()

    run(body, load=nothing)


def test_nothing_new_is_taken_while_draining_and_what_runs_ends() -> None:
    async def body(worker: Worker, knobs: Knobs) -> None:
        early = worker.reserve()
        running = worker.reserve()
        running.submit(requests(PROMPTS[0]))
        worker.drain()
        with pytest.raises(Draining):
            worker.reserve()
        early.submit(requests(PROMPTS[1]))
        for stream, prompt in ((running, PROMPTS[0]), (early, PROMPTS[1])):
            assert (await results(stream))[0].tokens == alone(prompt)[0]
        assert is_free(worker, knobs)

    run(body)
