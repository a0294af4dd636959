"""The process around the app: its socket, its signals, its end. Knows uvicorn.

The first SIGTERM (or Ctrl-C) drains: what runs comes to its end, what is new gets 503. The second,
or the drain timeout, ends every text where it is. The process ends with status 0 either way.
"""

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashdraft.errors import FlashDraftError
from flashdraft.serve.errors import ApiError
from flashdraft.serve.limits import MAX_HEADER_BYTES
from flashdraft.serve.worker import Worker

__all__ = ["Server", "listen", "run", "url_of"]

_LOG = logging.getLogger("flashdraft.serve")
_LAST_WORDS = 5.0  # seconds in which texts that were ended must reach their clients
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises FlashDraftError with what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that there could be
        why = error.strerror if isinstance(error, OSError) else "this is no name of a machine"
        got = f"cannot listen at `{host}`: {why}"
        raise FlashDraftError(got, hint="--host 127.0.0.1 is this machine") from None

    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        made.close()
        hint = "stop what listens there, or take another one: --port 8001"
        got = f"cannot listen at {host}:{port}: {error.strerror}"
        raise FlashDraftError(got, hint=hint) from None
    return made


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Protocol(H11Protocol):
    """HTTP/1.1 whose own refusals are in OpenAI's shape, too.

    scope["state"]["abort"] drops the connection, without waiting for a client that does not read.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, or has headers without an end."""
        unread = len(self.conn.trailing_data[0])
        error = ApiError(400, "this is no valid HTTP request", code="invalid_http")
        if unread > MAX_HEADER_BYTES:
            told = f"the headers have more than {MAX_HEADER_BYTES} bytes"
            error = ApiError(431, told, code="headers_too_large")

        may_answer = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if may_answer:
            for event in _events_of(error):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _events_of(error: ApiError) -> list[h11.Event]:
    body = json.dumps(error.body()).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    start = h11.Response(status_code=error.status, headers=headers)
    return [start, h11.Data(data=body), h11.EndOfMessage()]


class Server(uvicorn.Server):
    """One app and its worker, from the first connection to the end of the process."""

    def __init__(
        self,
        app: FastAPI,
        worker: Worker,
        *,
        drain_timeout: float = 30.0,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(_LAST_WORDS),
        )
        super().__init__(config)
        self.worker = worker
        self.drain_timeout = drain_timeout
        self._on_ready = on_ready
        self._num_signals = 0
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._starting = asyncio.create_task(self._watch_loading())

    async def _watch_loading(self) -> None:
        """Say when requests are taken; end where the model cannot be loaded."""
        worker = self.worker
        while worker.state == "loading":
            worker.changed.clear()
            await worker.changed.wait()
        if worker.state == "ready":
            self._on_ready()
        elif worker.model is None:
            self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals begin the end, and are not raised again behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        self._loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """As a signal does: drain at the first call, end every text at the second."""
        self._num_signals += 1
        if self._num_signals == 1:
            _LOG.info("draining")
            self.worker.drain()
            self._ending = asyncio.create_task(self._drain())
        else:
            _LOG.warning("ending what runs")
            self.worker.abort()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self.drain_timeout):
                await self._idle()
        except TimeoutError:
            _LOG.warning("the drain timeout is over; ending what runs")
            self.worker.abort()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):
                    await self._idle()
        self.should_exit = True

    async def _idle(self) -> None:
        worker = self.worker
        while worker.state != "dead" and not worker.is_idle:
            worker.changed.clear()
            await worker.changed.wait()


def run(server: Server, listening: socket.socket) -> None:
    """Serve until a signal ends it. Raises what the model could not be loaded for."""
    server.run(sockets=[listening])
    worker = server.worker
    if worker.model is None and worker.failure is not None:
        raise worker.failure
