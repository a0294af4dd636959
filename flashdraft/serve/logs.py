"""Logs as lines of JSON on standard error, written by a thread of their own.

A full disk, a closed pipe or a reader that has stopped loses lines, and counts them; it never stops
who logs. No prompt, no answer and no key is in any line.
"""

import json
import logging
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Container
from datetime import UTC, datetime
from typing import IO

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashdraft.files import Json
from flashdraft.serve.errors import ApiError
from flashdraft.serve.metrics import Metrics

__all__ = ["LEVELS", "JsonLines", "Traced", "Writer", "start"]

LEVELS = ("debug", "info", "warning", "error")
_LOG = logging.getLogger("flashdraft.serve.requests")
_PLAIN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_GONE = 499  # nginx's status for a client that left before it was answered
_MOST_WAITING = 10_000  # lines
_FACTS = "facts"  # the attribute of a record that `extra` sets


class JsonLines(logging.Formatter):
    """One line a record: time, level, logger, message, and the record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: Json = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = getattr(record, _FACTS, None)
        if facts is not None:
            line.update(facts)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Writer(logging.Handler):
    """Hands lines to a thread; what that cannot take or write is counted in `num_lost`."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.num_lost = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # whatever a record holds: a log must not stop who writes it
            self.num_lost += 1

    def finish(self, seconds: float = 1.0) -> None:
        """Wait a moment for the lines that are on their way."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if line is None:
                return
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed
                self.num_lost += 1


def start(level: str, stream: IO[str] | None = None) -> Writer:
    """All loggers of this process write there from now on."""
    writer = Writer(stream or sys.stderr)
    root = logging.getLogger()
    root.handlers[:] = [writer]
    root.setLevel(level.upper())
    for name in ("asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return writer


class Traced:
    """The outermost layer: every request has an id, a line in the log and a count in the metrics.

    An `x-request-id` of the client's is taken if it is short and plain; the answer carries it.
    scope["state"] holds `request_id`, and what inner layers add: `status`, where it is another than
    the one that was sent, and `facts` for the log. What falls through is answered with 500.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Container[str]) -> None:
        self.app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = time.monotonic()
        request_id = _given_id(scope) or uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["facts"] = {}
        sent: list[int] = []

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            _LOG.error("a request failed", exc_info=error)
            if sent:
                raise
            failed = ApiError(500, "the server failed at this request", code="internal_error")
            response = JSONResponse(failed.body(), failed.status)
            await response(scope, receive, send_with_id)
        finally:
            status = state.get("status") or (sent[0] if sent else _GONE)
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, status).inc()
            seconds = round(time.monotonic() - started, 4)
            facts = {"request_id": request_id, "method": scope["method"], "route": route}
            facts |= {"status": status, "seconds": seconds, **state["facts"]}
            _LOG.info("request", extra={_FACTS: facts})


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _PLAIN_ID.fullmatch(value):
            return str(value.decode())
    return None
