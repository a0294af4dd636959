"""One engine thread, and streams that carry its chunks to the event loop.

The thread owns the engine: nothing else calls it. Commands go in by a queue, chunks come out by
`call_soon_threadsafe`, once a step. All else here belongs to the event loop: who is admitted, who
listens, what was said to whom. Knows no HTTP, no JSON and no tokenizer.
"""

import asyncio
import gc
import itertools
import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

from flashdraft.decoding.grammar import prepare
from flashdraft.engine import Engine, Request
from flashdraft.errors import FlashDraftError
from flashdraft.generate import Model
from flashdraft.serve import room
from flashdraft.serve.metrics import Metrics
from flashdraft.types import Chunk, Result

__all__ = [
    "Draining",
    "EngineFault",
    "Limits",
    "NotReady",
    "Overloaded",
    "State",
    "Stream",
    "TimedOut",
    "TooManyAnswers",
    "TooSlow",
    "Worker",
]

State = Literal["loading", "ready", "draining", "dead"]
_LOG = logging.getLogger("flashdraft.serve")


class Overloaded(FlashDraftError):
    """Every row and every place in the queue is taken."""


class TooManyAnswers(FlashDraftError):
    """One call asks for more answers than rows and queue could ever hold."""


class NotReady(FlashDraftError):
    """The model is loading, or its engine is gone."""


class Draining(NotReady):
    """The server ends, and takes nothing new."""


class EngineFault(FlashDraftError):
    """The engine failed while this request was in it."""


class TimedOut(FlashDraftError):
    """The request took longer than it may."""


class TooSlow(FlashDraftError):
    """The client reads more slowly than its text is made, and its buffer is full."""


_REASONS: dict[type[Exception], str] = {TimedOut: "timeout", TooSlow: "slow"}


@dataclass(frozen=True)
class Limits:
    """How much a worker takes on."""

    max_rows: int = 8  # requests decoded together
    queue: int = 64  # requests that wait for a row; the next one is refused
    cache_bytes: int | None = None  # of keys and values; None: half of what is free
    buffer: int = 1024  # chunks of one stream that nobody has read yet
    timeout: float | None = 600.0  # seconds from the first byte of a request to its last

    @property
    def places(self) -> int:
        return self.max_rows + self.queue


class Stream:
    """The chunks of one call's requests, in the order of the steps.

    It is opened with its places in the queue taken, before anything is tokenised; `submit` sends
    the requests; `close` gives everything back, wherever they are. Chunk.index is the number of the
    request within the call. What ends a request early is raised by `next`, behind the chunks that
    came before it.
    """

    def __init__(self, worker: "Worker", places: int) -> None:
        self._worker = worker
        self._places = places  # that it still holds
        self._num_leaving = 0  # requests whose cancel is on its way to the engine
        self._chunks: deque[Chunk] = deque()
        self._arrived = asyncio.Event()
        self._numbers: dict[int, int] = {}  # of requests that go on: the engine's -> the call's
        self._error: Exception | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._opened = worker.now()
        self._first: dict[int, float] = {}  # when each request's first token came
        self.overflowed = asyncio.Event()  # the client is to be dropped

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if not self._numbers:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._chunks.popleft()

    @property
    def has_news(self) -> bool:
        """Whether the next chunk, the end or an error is there already."""
        return bool(self._chunks) or self._error is not None or not self._numbers

    async def news(self, seconds: float) -> bool:
        """Wait for the next chunk, the end or an error; False if none comes within `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.has_news:
                    self._arrived.clear()
                    await self._arrived.wait()
        return self.has_news

    def submit(self, requests: Sequence[Request]) -> None:
        """Send the requests to the engine. Raises NotReady, also where that came in between."""
        assert len(requests) <= self._places, "a request without a place"
        self._numbers = self._worker._start(self, requests)

    def close(self) -> None:
        """Cancel what is not finished. The places are free when the rows are; may come twice."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._chunks.clear()
        num_unused = self._places - self._num_leaving - len(self._numbers)
        self._give_back(num_unused)
        self._cancel("gone")

    # What follows is the worker's.

    def _expire_in(self, seconds: float | None) -> None:
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        left = self._opened + seconds - loop.time()
        hint = "ask for fewer tokens, or let the server wait longer: --request-timeout"
        error = TimedOut(f"the request took longer than {seconds:g} seconds", hint=hint)
        self._watch = loop.call_later(left, self._end_with, error)

    def _take(self, chunk: Chunk, limit: int) -> None:
        """One more chunk, if somebody still listens."""
        number = self._numbers.get(chunk.index)
        if number is None:
            return
        if chunk.error is None:
            self._measure(chunk, number)
        if chunk.result is not None or chunk.error is not None:
            del self._numbers[chunk.index]
            self._give_back(1)

        if chunk.error is not None:
            self._end_with(chunk.error)
        elif len(self._chunks) >= limit:
            hint = "read the stream as it comes"
            self.overflowed.set()
            self._end_with(TooSlow(f"{limit} chunks wait to be read", hint=hint))
        else:
            self._chunks.append(replace(chunk, index=number))
            self._arrived.set()

    def _measure(self, chunk: Chunk, number: int) -> None:
        now = self._worker.now()
        metrics = self._worker.metrics
        if chunk.tokens and number not in self._first:
            self._first[number] = now
            metrics.first_token.observe(now - self._opened)
        if chunk.result is None:
            return

        metrics.request.observe(now - self._opened)
        later = len(chunk.result.tokens) - 1
        if later > 0:
            metrics.token.observe((now - self._first[number]) / later)

    def _end_with(self, error: Exception) -> None:
        """End all requests of the call; `next` raises the error behind what has come so far."""
        if self._error is None:
            self._error = error
        self._cancel(_REASONS.get(type(error), "failed"))
        self._arrived.set()

    def _cancel(self, reason: str) -> None:
        """Have the engine forget what is unfinished; the places come back when it has."""
        unfinished = list(self._numbers)
        self._numbers = {}
        self._num_leaving += len(unfinished)
        if unfinished:
            self._worker._cancel(self, unfinished, reason)

    def _have_left(self, count: int) -> None:
        self._num_leaving -= count
        self._give_back(count)

    def _give_back(self, places: int) -> None:
        self._places -= places
        self._worker._free(places)


class Worker:
    """A model behind one thread.

    load: called on the engine thread, so that the server answers while weights are read. All
    methods but those named `_on_*` belong to the event loop that `start` was called on.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        limits: Limits | None = None,
        *,
        new_engine: Callable[[Model], Engine] | None = None,
    ) -> None:
        """new_engine: also makes the one that follows an engine that failed."""
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.model: Model | None = None
        self.state: State = "loading"
        self.failure: BaseException | None = None  # why the thread ended, if it did not have to
        self.changed = asyncio.Event()  # set whenever `state` or the number of requests changes
        self._load = load
        self._new_engine = new_engine or self._engine_with_room
        self._taken = 0  # places
        self._streams: dict[int, Stream] = {}  # by the engine's number of a request
        self._numbers = itertools.count()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._on_thread, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.metrics.running.set_function(lambda: self.num_running)
        self.metrics.waiting.set_function(lambda: self.num_waiting)
        self.metrics.cache_tokens.set_function(lambda: self.num_tokens)
        self.metrics.ready.set_function(lambda: self.is_ready)
        # The thread's own:
        self._engine: Engine | None = None
        self._requests: dict[int, Request] = {}
        self._gone_over: set[int] = set()  # that waited when an engine failed
        self._stopping = False
        self._aborted = False

    # --- on the event loop ------------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def now(self) -> float:
        """Seconds, by the event loop's clock."""
        assert self._loop is not None
        return self._loop.time()

    @property
    def is_ready(self) -> bool:
        return self.state == "ready" and self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a place."""
        return self._taken == 0

    def check_ready(self) -> None:
        """Raises NotReady or Draining."""
        if self.state == "draining":
            raise Draining("the server is shutting down", hint="ask another one, or again later")
        if self.state == "loading":
            raise NotReady("the model is loading", hint="try again when /ready answers 200")
        if not self.is_ready:
            raise NotReady("the engine is gone", hint="restart the server; its log says why")

    def reserve(self, places: int = 1) -> Stream:
        """A stream that holds so many places, one for each request.

        Raises NotReady, Overloaded or TooManyAnswers.
        """
        self.check_ready()
        most = self.limits.places
        if places > most:
            refused = f"{places} answers were asked for, and this server holds {most}"
            raise TooManyAnswers(refused, hint=f"ask for at most {most} at once")
        if self._taken + places > most:
            busy = f"{self._taken} requests run or wait, of {most} at most"
            raise Overloaded(busy, hint="try again in a moment")

        self._taken += places
        return Stream(self, places)

    def drain(self) -> None:
        """Take nothing new; what was admitted goes on."""
        if self.state in ("loading", "ready"):
            self._set_state("draining")

    def abort(self) -> None:
        """End every text where it is, with the finish reason `abort`; also what still comes."""
        self._commands.put(self._on_abort)

    async def stop(self, seconds: float = 10.0) -> bool:
        """End the thread behind the step that it is in; False if that takes longer."""
        self.drain()
        self._commands.put(self._on_stop)
        await asyncio.to_thread(self._thread.join, seconds)
        return not self._thread.is_alive()

    def _start(self, stream: Stream, requests: Sequence[Request]) -> dict[int, int]:
        if self.state != "draining":  # what was admitted before still comes through
            self.check_ready()
        numbers: dict[int, int] = {}
        for i, request in enumerate(requests):
            request.index = next(self._numbers)
            numbers[request.index] = i
            self._streams[request.index] = stream
        stream._expire_in(self.limits.timeout)
        self._commands.put(partial(self._on_submit, list(requests)))
        return numbers

    def _cancel(self, stream: Stream, numbers: list[int], reason: str) -> None:
        for number in numbers:
            self._streams.pop(number, None)
        if not self._thread.is_alive():
            stream._have_left(len(numbers))
            return
        self._commands.put(partial(self._on_cancel, stream, numbers, reason))

    def _free(self, places: int) -> None:
        self._taken -= places
        assert self._taken >= 0, "a place came back twice"
        self.changed.set()

    def _set_state(self, state: State) -> None:
        if self.state == "draining" and state == "ready":
            return
        self.state = state
        self.changed.set()

    def _deliver(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            stream = self._streams.get(chunk.index)
            if stream is None:
                continue
            if chunk.result is not None or chunk.error is not None:
                del self._streams[chunk.index]
            stream._take(chunk, self.limits.buffer)

    def _cancelled(self, stream: Stream, count: int, reason: str) -> None:
        self.metrics.cancelled.labels(reason).inc(count)
        stream._have_left(count)

    def _fail(self, numbers: list[int], error: Exception) -> None:
        """These requests are gone; the engine holds nothing of them any more."""
        chunks = [Chunk(number, (), (), error=error) for number in numbers]
        self._deliver(chunks)

    def _bury(self) -> None:
        """The thread has ended: so have all requests."""
        self._set_state("dead")
        gone = EngineFault("the engine is gone", hint="restart the server; its log says why")
        self._fail(list(self._streams), gone)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        engine = self._engine
        return 0 if engine is None else engine.max_rows - engine.num_free

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held, for prompts to come as well."""
        engine = self._engine
        return 0 if engine is None else engine.num_tokens

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return max(0, len(self._streams) - self.num_running)

    # --- on the engine thread ---------------------------------------------------------------------

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Have it called on the event loop, if that still runs."""
        assert self._loop is not None
        with suppress(RuntimeError):  # closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_thread(self) -> None:
        try:
            self._on_load()
            while not self._stopping:
                self._on_commands()
                if self._on_engine().has_work and not self._stopping:
                    self._on_step()
        except BaseException as error:
            self.failure = error
            if self.model is not None:
                _LOG.critical("the engine thread ended", exc_info=error)
        finally:
            self._engine = None
            self._tell(self._bury)

    def _on_load(self) -> None:
        model = self._load()
        prepare(model.tokenizer)  # later it would hold up every stream
        self._engine = self._new_engine(model)
        self.model = model
        self._tell(self._set_state, "ready")

    def _engine_with_room(self, model: Model) -> Engine:
        return room.new_engine(model, self.limits.max_rows, self.limits.cache_bytes)

    def _on_engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def _on_commands(self) -> None:
        """Do what was asked for since the last step; wait for it where there is nothing else."""
        if not self._on_engine().has_work:
            command = self._commands.get()
            command()
        while not self._commands.empty():
            command = self._commands.get()
            command()

    def _on_submit(self, requests: list[Request]) -> None:
        if self._aborted:
            self._tell(self._deliver, [_aborted(request) for request in requests])
            return
        for request in requests:
            try:
                self._on_engine().submit(request)
            except FlashDraftError as error:
                self._tell(self._fail, [request.index], error)
            else:
                self._requests[request.index] = request

    def _on_cancel(self, stream: Stream, numbers: list[int], reason: str) -> None:
        fault = ""
        for number in numbers:
            request = self._requests.pop(number, None)
            if request is None or fault:
                continue
            try:
                self._on_engine().cancel(number)
            except Exception as error:  # the row is neither free nor in use
                fault = "".join(traceback.format_exception(error))
        if fault:
            self._on_fault(fault)
        self._tell(self._cancelled, stream, len(numbers), reason)

    def _on_stop(self) -> None:
        self._stopping = True

    def _on_abort(self) -> None:
        self._aborted = True
        chunks = []
        for number, request in self._requests.items():
            self._on_engine().cancel(number)
            chunks.append(_aborted(request))
        self._requests = {}
        self._tell(self._deliver, chunks)

    def _on_step(self) -> None:
        fault = ""
        try:
            chunks = self._on_engine().step()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # a library's panic in Rust is no Exception
            fault = "".join(traceback.format_exception(error))
        if fault:  # behind the `except`, where the error's frames hold no engine any more
            self._on_fault(fault)
            return

        for chunk in chunks:
            if chunk.result is not None or chunk.error is not None:
                self._requests.pop(chunk.index, None)
        if chunks:
            self._tell(self._deliver, chunks)

    def _on_fault(self, fault: str) -> None:
        """Go on with a new engine: what a broken step has left in caches could change a text.

        Requests that the old one had not begun go over, once; the others fail.
        """
        _LOG.error("the engine failed; a new one is made\n%s", fault)
        assert self.model is not None
        self._engine = None  # its caches go before there are new ones
        gc.collect()
        self._engine = self._new_engine(self.model)
        self._tell(self.metrics.faults.inc)

        begun = []
        untouched = []
        for number, request in self._requests.items():
            if request.history or number in self._gone_over:
                begun.append(number)
            else:
                untouched.append(request)
        self._requests = {}
        hint = "ask again; the server goes on"
        self._tell(self._fail, begun, EngineFault("the engine failed", hint=hint))
        self._gone_over = {request.index for request in untouched}
        self._on_submit(untouched)


def _aborted(request: Request) -> Chunk:
    """The last chunk of a text that is ended from outside."""
    stats = request.stats
    stats.num_prompt_tokens = len(request.prompt)
    tokens = tuple(request.history[len(request.prompt) :])
    logprobs = tuple(request.logprobs) if request.params.logprobs else None
    result = Result(request.decoder.text, tokens, "abort", stats, logprobs)
    return Chunk(request.index, (), (), result)
