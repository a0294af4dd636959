"""A tiny random model behind the real server, on a free port, in a thread of the test's process.

`Knobs` slow the engine down, stop it, or let it fail, while the server runs.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Any, NamedTuple

import httpx2 as httpx
from conftest import EOS, VOCAB, tiny_drafter, tiny_target
from toy_folders import letter_tokenizer

from flashdraft.engine import Engine, Request
from flashdraft.generate import Model
from flashdraft.scheduler import Scheduler
from flashdraft.serve.app import Options, make_app
from flashdraft.serve.server import Server, listen, url_of
from flashdraft.serve.worker import Limits, Worker
from flashdraft.types import Chunk

NAME = "toy"
LONG = 200  # tokens of a text that goes on for a while; the context holds 256


def toy_model(*, max_rows: int = 4) -> Model:
    """A random llama of 61 letters with a random DFlash drafter; float64."""
    target = tiny_target("llama", lean=True)
    assert target.vocab_size == VOCAB
    return Model(
        target,
        letter_tokenizer(),
        lambda: tiny_drafter(target),
        eos=frozenset({EOS}),
        max_rows=max_rows,
    )


@dataclass
class Knobs:
    """What a test does to the engine of a running server."""

    seconds: float = 0.0  # that every step takes longer
    fault: BaseException | None = None  # raised by the next step, once
    lasts: bool = False  # by every one
    open: threading.Event = field(default_factory=threading.Event)  # steps wait for it
    engines: list[Engine] = field(default_factory=list)  # that were made, the last one runs
    steps: int = 0

    def __post_init__(self) -> None:
        self.open.set()

    def new_engine(self, max_rows: int) -> Callable[[Model], Engine]:
        def made(model: Model) -> Engine:
            engine = _Paced(self, model, max_rows)
            self.engines.append(engine)
            return engine

        return made

    @property
    def num_in_engine(self) -> int:
        """Requests that wait, are read or run in the engine."""
        scheduler = self.engines[-1].scheduler
        return len(scheduler.waiting) + len(scheduler.requests())

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        self.seconds = seconds
        try:
            yield
        finally:
            self.seconds = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step begins inside."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


class _Paced(Engine):
    def __init__(self, knobs: Knobs, model: Model, max_rows: int) -> None:
        scheduler = Scheduler[Request](max_rows, keeps=True)
        super().__init__(model.target, model.new_drafter(), scheduler=scheduler)
        self.knobs = knobs

    def step(self) -> list[Chunk]:
        self.knobs.open.wait()
        time.sleep(self.knobs.seconds)
        self.knobs.steps += 1
        fault = self.knobs.fault
        if fault is not None:
            self.knobs.fault = fault if self.knobs.lasts else None
            raise fault
        return super().step()


@dataclass
class Toy:
    """A running server."""

    url: str
    worker: Worker
    server: Server
    knobs: Knobs
    loop: asyncio.AbstractEventLoop

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples with this name and these labels."""
        total = 0.0
        for family in self.worker.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == f"flashdraft_{name}" and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def settle(self, seconds: float = 5.0) -> None:
        """Wait until nobody holds a place, and look that the engine holds nothing either."""
        until(lambda: self.worker.is_idle, seconds)
        assert self.knobs.num_in_engine == 0


def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Wait for it; returns how long that took. Fails if it does not come true."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not come true"
        time.sleep(0.002)
    return time.monotonic() - started


@contextmanager
def running(
    limits: Limits | None = None,
    options: Options | None = None,
    *,
    load: Callable[[], Model] = toy_model,
    drain_timeout: float = 5.0,
    wait: bool = True,
    send_buffer: int | None = None,
) -> Iterator[Toy]:
    """A server, ready unless `wait` is False; stopped at the end.

    send_buffer: bytes that the kernel holds for a client that does not read.
    """
    limits = limits or Limits(max_rows=4, queue=8)
    knobs = Knobs()
    worker = Worker(load, limits, new_engine=knobs.new_engine(limits.max_rows))
    app = make_app(worker, options or Options(model_name=NAME))
    server = Server(app, worker, drain_timeout=drain_timeout)
    listening = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = url_of(listening)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_serve, args=(loop, server, listening), daemon=True)
    thread.start()
    try:
        if wait:
            until(lambda: worker.is_ready, 30)
        yield Toy(url, worker, server, knobs, loop)
    finally:
        knobs.open.set()
        if thread.is_alive():
            loop.call_soon_threadsafe(server.end)
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
        loop.close()


def _serve(loop: asyncio.AbstractEventLoop, server: Server, listening: Any) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(server.serve(sockets=[listening]))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())


# --- what clients send and read -------------------------------------------------------------------


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    asked = {"model": NAME, "messages": [{"role": "user", "content": text}]}
    return {**asked, "temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields}


def events_of(lines: Iterable[str]) -> Iterator[Any]:
    """The data of every event: parsed JSON, or the text `[DONE]`. Comments are left out."""
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def text_of(events: Iterable[Any]) -> str:
    """What a streamed chat has said, choice 0."""
    text = ""
    for event in events:
        if event != "[DONE]":
            for choice in event["choices"]:
                text += choice["delta"].get("content", "")
    return text


def said(toy: Toy, body: dict[str, Any]) -> str:
    """The text of a chat's answer, streamed or whole."""
    with toy.client() as client:
        if not body.get("stream"):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            events = list(events_of(stream.iter_lines()))
        assert events[-1] == "[DONE]"
        return text_of(events)


class Answer(NamedTuple):
    """What came back over a socket."""

    status: int
    body: bytes


def raw(toy: Toy, request: bytes) -> Answer:
    """The answer to bytes that no client library would send."""
    with connected(toy) as sock:
        sock.sendall(request)
        return answer_from(sock)


def answer_from(sock: socket.socket) -> Answer:
    response = HTTPResponse(sock)
    try:
        response.begin()
        return Answer(response.status, response.read())
    finally:
        response.close()


def connected(toy: Toy) -> socket.socket:
    host, _, port = toy.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def posted(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """The bytes of a POST."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: toy\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
