"""How an answer goes out: whole, or as a stream of server-sent events.

Both listen for the client while they wait: once it is gone, its rows are given back. Knows ASGI and
chunks. Does not know what the bodies hold.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from flashdraft.files import Json
from flashdraft.serve.errors import ApiError, as_api_error
from flashdraft.serve.limits import refusal
from flashdraft.serve.replies import Reply
from flashdraft.serve.worker import (
    Draining,
    EngineFault,
    NotReady,
    Overloaded,
    Stream,
    TimedOut,
    TooManyAnswers,
    TooSlow,
)

__all__ = ["EventStream", "Whole", "as_refusal"]

_LOG = logging.getLogger("flashdraft.serve")
_GONE = 499  # nginx's status for a client that did not wait; nobody sees it but the log
_RETRY = {"retry-after": "1"}
_PATIENCE = 60.0  # seconds that a client may leave a piece of its stream unread
_DONE = format_sse_event(data_str="[DONE]")
_STATUSES: dict[type[Exception], tuple[int, str]] = {
    Overloaded: (429, "overloaded"),
    Draining: (503, "shutting_down"),
    NotReady: (503, "not_ready"),
    EngineFault: (503, "engine_fault"),
    TimedOut: (504, "timeout"),
    TooSlow: (504, "too_slow"),
}


def as_refusal(error: Exception, *, prompt: str = "prompt") -> ApiError:
    """What a client is told of an error of the worker's, or of any other. Logs our own faults."""
    if isinstance(error, TooManyAnswers):
        return ApiError(400, _told(error), param="n", code="invalid_value")
    for kind, (status, code) in _STATUSES.items():
        if isinstance(error, kind):
            return ApiError(status, _told(error), code=code, headers=_RETRY)

    refused = as_api_error(error, prompt=prompt)
    if refused.status == 500:
        _LOG.error("a request failed", exc_info=error)
    return refused


def _told(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{error.args[0]} ({hint})" if hint else str(error.args[0])


class Whole(Response):
    """One JSON body, sent when the last chunk is there."""

    def __init__(self, stream: Stream, reply: Reply, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._stream = stream
        self._reply = reply
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        collected = asyncio.create_task(self._collect())
        try:
            is_there = await _before_leaving(collected, receive)
        finally:
            collected.cancel()
            self._stream.close()

        if not is_there:
            scope["state"]["status"] = _GONE
            return
        await collected.result()(scope, receive, send)

    async def _collect(self) -> Response:
        try:
            async for chunk in self._stream:
                self._reply.take(chunk)
            if self._reply.is_large:  # the event loop has others to serve meanwhile
                response = await asyncio.to_thread(self._told)
            else:
                response = self._told()
        except Exception as error:
            return refusal(as_refusal(error, prompt=self._reply.call.prompt_field))
        self._on_end()
        return response

    def _told(self) -> Response:
        return JSONResponse(self._reply.whole())


class EventStream(EventSourceResponse):
    """One event a chunk, `[DONE]` at the end.

    The status waits for the first chunk, so that what fails before it has a status of its own; but
    no longer than `keep_alive` seconds, when the first comment goes out. What fails later is an
    event {"error": ...}, and the end of the stream.
    """

    def __init__(
        self, stream: Stream, reply: Reply, on_end: Callable[[], None], keep_alive: float
    ) -> None:
        super().__init__((), headers={"cache-control": "no-cache"})
        self.headers["x-accel-buffering"] = "no"  # nginx would hold events back
        self._stream = stream
        self._reply = reply
        self._on_end = on_end
        self._keep_alive = keep_alive
        self._is_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = asyncio.create_task(self._say(scope, receive, send))
        full = asyncio.create_task(self._stream.overflowed.wait())
        try:
            is_there = await _before_leaving(said, receive, full)
        finally:
            said.cancel()
            full.cancel()
            self._stream.close()

        if full.done() and not full.cancelled():
            scope["state"]["status"] = _STATUSES[TooSlow][0]
            drop = scope["state"].get("abort")
            if drop is not None:
                drop()
        elif not is_there:
            scope["state"]["status"] = _GONE

    async def _say(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for piece in self._pieces():
                await self._write(send, piece)
        except Exception as error:
            refused = as_refusal(error, prompt=self._reply.call.prompt_field)
            if not self._is_begun:
                await refusal(refused)(scope, receive, send)
                return
            scope["state"]["status"] = refused.status
            await self._write(send, _event(refused.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[bytes]:
        stream = self._stream
        while True:
            while not await stream.news(self._keep_alive):
                yield KEEPALIVE_COMMENT
            chunk = await anext(stream, None)
            if chunk is None:
                break
            event = self._reply.take(chunk)
            if event is not None:
                yield _event(event)

        if self._reply.call.body.wants_usage:
            yield _event(self._reply.last())
        self._on_end()
        yield _DONE

    async def _write(self, send: Send, piece: bytes) -> None:
        if not self._is_begun:
            self._is_begun = True
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
        body = {"type": "http.response.body", "body": piece, "more_body": True}
        try:
            async with asyncio.timeout(_PATIENCE):
                await send(body)
        except TimeoutError:
            self._stream.overflowed.set()
            await asyncio.Event().wait()  # until `__call__`, which drops the client, cancels us


def _event(data: Json) -> bytes:
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False, separators=(",", ":")))


async def _before_leaving(
    work: asyncio.Task[object], receive: Receive, *others: asyncio.Task[object]
) -> bool:
    """Wait for the work, for the client to leave, or for one of the others; whether it is done."""
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, gone, *others}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    return work.done()


async def _gone(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
