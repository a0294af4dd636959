"""An OpenAI-compatible server as its client sees it: what it serves, and an answer as it streams.

Knows HTTP, server-sent events and the chat endpoint's words. Does not know how many ask at a time,
nor what is made of the times. The client shares the machine's cores with the server that it
measures, hence `http.client` and threads: an event costs them 26 microseconds of CPU, httpx 111.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from flashdraft.errors import FlashDraftError
from flashdraft.files import Json, parse_json
from flashdraft.types import require

__all__ = ["Api", "Body", "Event", "Reply", "ServerError"]

Body = Json  # a request's fields
Event = Json  # what one event of a stream says
_PIECE = 1 << 16  # bytes that are read at once, at most
_END = b"[DONE]"
_KEY = "OPENAI_API_KEY"


class ServerError(FlashDraftError):
    """The server is not there, does not answer as the protocol says, or refuses.

    status: its HTTP status; 0 where no whole answer came.
    """

    def __init__(self, message: str, *, hint: str | None = None, status: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.status = status


@dataclass
class Reply:
    """One streamed answer. Times are in seconds since the request was sent."""

    arrivals: list[float] = field(default_factory=list)  # of every event with text
    seconds: float = 0.0  # until the stream's end
    text: str = ""
    finish: str | None = None
    num_prompt_tokens: int = 0
    num_cached: int = 0  # prompt tokens that the server had read before
    num_tokens: int = 0
    drafts: Json | None = None  # vLLM's `metrics.speculative_decoding`, where it is sent


@dataclass(frozen=True)
class Api:
    """A server by its address, with or without `/v1`.

    The key, if it wants one, is in the environment's OPENAI_API_KEY. Used by one thread at a time.
    """

    url: str
    timeout: float = 600.0  # seconds without a byte

    def __post_init__(self) -> None:
        require(_is_address(self.url), "url", self.url, "like http://127.0.0.1:8000")

    @property
    def _address(self) -> SplitResult:
        return urlsplit(self.url)

    @cached_property
    def _connection(self) -> HTTPConnection:
        host = self._address.hostname or ""
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        return kind(host, self._address.port, timeout=self.timeout)

    def close(self) -> None:
        """Hang up, also in the middle of an answer; the next request connects again."""
        self._connection.close()

    def get(self, path: str) -> Any:
        """What a JSON page says. Raises ServerError."""
        response = self._send("GET", path, None)
        content = self._rest(response)
        try:
            return parse_json(content)
        except ValueError:
            got = f"`{self.url}` answers GET {path} with no JSON: {_one_line(content)}"
            raise ServerError(got, hint="is it an OpenAI-compatible server?") from None

    def model(self, name: str | None) -> str:
        """The model to ask: that one, or the only one there is. Raises ServerError."""
        page = self.get("/models")
        try:
            names = [str(entry["id"]) for entry in page["data"]]
        except (KeyError, TypeError):
            got = f"`{self.url}` does not list its models: {_one_line(json.dumps(page))}"
            raise ServerError(got, hint="is it an OpenAI-compatible server?") from None

        served = ", ".join(f"`{each}`" for each in names) or "none"
        if name is None and len(names) == 1:
            return names[0]
        if name is None:
            raise ServerError(f"`{self.url}` serves {served}", hint="name one with --model")
        if name not in names:
            raise ServerError(f"`{self.url}` serves {served}, not `{name}`", hint="name one it has")
        return name

    def ask(self, body: Body) -> Reply:
        """Send a chat request that streams, and hear it out. Raises ServerError."""
        reply = Reply()
        started = time.perf_counter()
        for event in self.events("/chat/completions", body):
            arrived = time.perf_counter() - started
            if _note(reply, event):
                reply.arrivals.append(arrived)
        reply.seconds = time.perf_counter() - started

        if not reply.num_tokens:
            got = f"`{self.url}` does not say how many tokens an answer has"
            hint = "it must send `usage` where `stream_options` ask for it"
            raise ServerError(got, hint=hint)
        return reply

    def events(self, path: str, body: Body) -> Iterator[Event]:
        """Events as they arrive, without the last one that says that they end.

        Raises ServerError for a refusal, an error inside the stream, and a stream that breaks off.
        """
        response = self._send("POST", path, body)
        is_over = False
        for data in self._lines(response):
            if data == _END:
                is_over = True
                continue
            event = self._parsed(data)
            if event.get("error"):
                self.close()
                raise ServerError(f"the stream ends with {_message(event)}", status=200)
            yield event
        if not is_over:
            self.close()
            raise ServerError(f"`{self.url}` broke a stream off", hint="see the server's log")

    def _parsed(self, data: bytes) -> Event:
        try:
            event = parse_json(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.close()
            raise ServerError(f"an event of `{self.url}` is no JSON object: {_one_line(data)}")
        return event

    def _lines(self, response: HTTPResponse) -> Iterator[bytes]:
        """The data of every event, which are one line each; comments keep a connection alive."""
        rest = b""
        while True:
            try:
                piece = response.read1(_PIECE)
            except (OSError, HTTPException) as error:
                raise self._lost(error) from None
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    def _send(self, method: str, path: str, body: Body | None) -> HTTPResponse:
        """The answer's head, of a request that was not refused. Raises ServerError."""
        content = None if body is None else json.dumps(body).encode()
        try:
            response = self._exchange(method, path, content)
        except (OSError, HTTPException, UnicodeError) as error:  # the last: no name of a host
            raise self._lost(error) from None

        if response.status != 200:
            raise self._refusal(response)
        return response

    def _exchange(self, method: str, path: str, content: bytes | None) -> HTTPResponse:
        """A connection that was kept may have been closed from the other side: it is made again."""
        was_open = self._connection.sock is not None
        target = self._path(path)
        try:
            self._connection.request(method, target, content, self._headers)
            return self._connection.getresponse()
        except (ConnectionError, HTTPException):
            self.close()
            if not was_open:
                raise
        self._connection.request(method, target, content, self._headers)
        return self._connection.getresponse()

    def _path(self, path: str) -> str:
        base = self._address.path.rstrip("/")
        return f"{base or '/v1'}{path}"

    @property
    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(_KEY, "").strip()
        if not key:
            return headers

        is_sendable = key.isascii() and key.isprintable()
        if not is_sendable:
            got = f"{_KEY} holds a character that no header can carry"
            raise ServerError(got, hint="it must be one key alone")
        headers["Authorization"] = f"Bearer {key}"
        return headers

    def _rest(self, response: HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, HTTPException) as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> ServerError:
        self.close()
        if isinstance(error, TimeoutError):
            got = f"`{self.url}` is silent for {self.timeout:g} seconds"
            return ServerError(got, hint="see whether it is busy")
        got = f"no answer from `{self.url}`: {str(error) or type(error).__name__}"
        return ServerError(got, hint="see that it runs and listens there: flashdraft serve")

    def _refusal(self, response: HTTPResponse) -> ServerError:
        content = self._rest(response)
        try:
            said = _message(parse_json(content))
        except ValueError:
            said = _one_line(content)
        status = response.status
        got = f"`{self.url}` refuses with {status}: {said}"
        return ServerError(got, hint=_HINTS.get(status), status=status)


_HINTS = {
    401: f"put the server's key into {_KEY}",
    403: f"put the server's key into {_KEY}",
    404: "is it an OpenAI-compatible server? Give its address up to /v1",
    429: "it is full: fewer requests at a time, or a longer queue of the server",
    503: "it loads, drains or is full: wait, or see its log",
}


def _is_address(url: str) -> bool:
    """Whether it is an address and no more: names, keys and queries in it would be passed over."""
    if not url.isascii() or not url.isprintable() or any(mark in url for mark in " ?#"):
        return False
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError:
        return False

    is_web = address.scheme in ("http", "https")
    has_host = bool(address.hostname) and address.username is None
    return is_web and has_host and port != 0


def _note(reply: Reply, event: Event) -> bool:
    """Write down what an event says; returns whether it brought text."""
    usage = event.get("usage")
    if usage:
        details = usage.get("prompt_tokens_details") or {}
        reply.num_prompt_tokens = usage.get("prompt_tokens", 0)
        reply.num_cached = details.get("cached_tokens") or 0
        reply.num_tokens = usage.get("completion_tokens", 0)
    metrics = event.get("metrics")
    if metrics:
        reply.drafts = metrics.get("speculative_decoding")

    choices = event.get("choices")
    if not choices:
        return False
    choice = choices[0]
    reply.finish = choice.get("finish_reason") or reply.finish
    delta = choice.get("delta") or {}
    text = delta.get("content") or delta.get("reasoning_content") or ""
    reply.text += text
    return bool(text)


def _message(said: object) -> str:
    """An error in OpenAI's shape, or whatever it is."""
    error = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(error, dict):
        error = error.get("message", error)
    return _one_line(str(error))


def _one_line(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    in_one_line = " ".join(text.split())
    return f"{in_one_line:.300}" or "nothing"
