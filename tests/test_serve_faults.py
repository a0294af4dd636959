"""What goes wrong while a server runs: clients that leave, wait or do not read; an engine that
fails. Whoever is not concerned sees nothing of it, and no row stays behind.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import torch
from toy_server import (
    LONG,
    NAME,
    Toy,
    answer_from,
    chat_body,
    connected,
    events_of,
    posted,
    running,
    said,
    toy_model,
    until,
)

from flashdraft.engine import Engine
from flashdraft.generate import Model
from flashdraft.serve import app as app_module
from flashdraft.serve.app import Options
from flashdraft.serve.replies import Reply
from flashdraft.serve.worker import Limits, Worker
from flashdraft.types import Chunk

CHAT = "/v1/chat/completions"
PACE = 0.02  # seconds that a step takes longer while a test looks
Json = dict[str, Any]


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    with running(Limits(max_rows=2, queue=2), Options(NAME, keep_alive=0.1)) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Behind every test the shared server is idle, and nothing is in its engine."""
    yield
    if "toy" in request.fixturenames:
        request.getfixturevalue("toy").settle()


def long_body(**fields: Any) -> Json:
    return chat_body(max_tokens=LONG, **fields)


@contextmanager
def reading(toy: Toy, body: Json) -> Iterator[Iterator[Any]]:
    """The events of a stream, as they come."""
    with toy.client() as client, client.stream("POST", CHAT, json=body) as stream:
        assert stream.status_code == 200, stream.read()
        yield events_of(stream.iter_lines())


def in_threads(work: Callable[[Json], Any], bodies: list[Json]) -> list[Any]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(work, bodies))


# --- clients that leave ---------------------------------------------------------------------------


def leave(toy: Toy, body: Json) -> float:
    """Ask, go away when the engine works on it; the seconds until its row is free."""
    steps = toy.knobs.steps
    num_before = toy.knobs.num_in_engine
    with connected(toy) as sock:
        sock.sendall(posted(body))
        until(lambda: toy.knobs.num_in_engine > num_before)
        until(lambda: toy.knobs.steps > steps + 3)
    return until(lambda: toy.knobs.num_in_engine <= num_before)


@pytest.mark.alone
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_row_back_within_a_step(stream: bool, toy: Toy) -> None:
    before = toy.metric("cancelled_requests_total", reason="gone")
    with toy.knobs.slow(PACE):
        assert leave(toy, long_body(stream=stream)) < PACE + 0.2
    toy.settle()
    assert toy.metric("cancelled_requests_total", reason="gone") == before + 1
    assert toy.metric("running_requests") == 0


@pytest.mark.alone
def test_all_answers_of_a_client_that_leaves_are_given_back(toy: Toy) -> None:
    before = toy.metric("cancelled_requests_total")
    with toy.knobs.slow(PACE):
        assert leave(toy, long_body(stream=True, n=4)) < PACE + 0.2
    toy.settle()
    assert toy.metric("cancelled_requests_total") == before + 4


@pytest.mark.alone
def test_a_worker_that_forgets_to_cancel_is_seen(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = Worker._cancel
    forgotten: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Worker, "_cancel", lambda *arguments: forgotten.append(arguments))
    with pytest.raises(AssertionError):
        test_a_client_that_leaves_gives_its_row_back_within_a_step(True, toy)
    monkeypatch.undo()
    for arguments in forgotten:
        toy.loop.call_soon_threadsafe(cancel, *arguments)


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(toy: Toy) -> None:
    with toy.knobs.held():
        sockets = [connected(toy) for _ in range(4)]
        for sock in sockets:
            sock.sendall(posted(chat_body(stream=True)))
        until(lambda: toy.worker.limits.places - toy.worker._taken == 0)
        with toy.client() as client:
            assert client.post(CHAT, json=chat_body()).status_code == 429
        for sock in sockets:
            sock.close()
    until(lambda: toy.worker.is_idle)
    assert said(toy, chat_body())


def test_a_client_that_leaves_changes_no_text_of_the_others(toy: Toy) -> None:
    body = chat_body(max_tokens=60)
    alone = said(toy, body)
    with toy.knobs.slow(0.005), reading(toy, {**body, "stream": True}) as events:
        first = next(events)
        leave(toy, long_body(text="other", stream=True))
        rest = list(events)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in [first, *rest[:-1]])
    assert text == alone
    assert rest[-1] == "[DONE]"


def test_a_client_that_does_not_read_is_dropped_and_the_others_go_on() -> None:
    limits = Limits(max_rows=6, queue=0, buffer=8)
    with running(limits, send_buffer=4096) as toy:
        alone = said(toy, chat_body("other", max_tokens=100))
        body = long_body(stream=True, logprobs=True, n=5)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, _, port = toy.url.removeprefix("http://").partition(":")
            sock.connect((host, int(port)))
            sock.sendall(posted(body))
            assert said(toy, chat_body("other", max_tokens=100)) == alone
            until(lambda: toy.metric("cancelled_requests_total", reason="slow") > 0, 10)
            until(lambda: not toy.server.server_state.connections)
        toy.settle()
        assert toy.metric("requests_total", route=CHAT, status="504") == 1


# --- more than there is room for ------------------------------------------------------------------


def test_the_queue_is_filled_and_the_rest_is_refused_before_it_is_tokenised(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_places = toy.worker.limits.places
    prompts = [f"text {'abcdefghij'[i % 10]}{'xyz'[i // 10]}" for i in range(20)]
    sequential = {prompt: said(toy, chat_body(prompt, max_tokens=5)) for prompt in prompts}
    translated = []
    translate = app_module.translate

    def counted(*arguments: Any, **options: Any) -> Any:
        translated.append(arguments)
        return translate(*arguments, **options)

    monkeypatch.setattr(app_module, "translate", counted)
    answers: dict[str, httpx.Response] = {}

    def ask(prompt: str) -> None:
        with toy.client() as client:
            answers[prompt] = client.post(CHAT, json=chat_body(prompt, max_tokens=5))

    with toy.knobs.held(), ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask, prompt) for prompt in prompts]
        until(lambda: len(answers) == 20 - num_places)
        time.sleep(0.05)
        assert len(answers) == 20 - num_places
        toy.knobs.open.set()
        for one in asked:
            one.result()

    refused = [answer for answer in answers.values() if answer.status_code != 200]
    assert len(refused) == 20 - num_places
    assert len(translated) == num_places
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.elapsed.total_seconds() < 2
    for prompt, answer in answers.items():
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["message"]["content"]
            assert text == sequential[prompt]


@pytest.mark.alone
def test_a_refusal_of_a_full_server_takes_no_time(toy: Toy) -> None:
    with toy.knobs.held():
        sockets = [connected(toy) for _ in range(4)]
        for sock in sockets:
            sock.sendall(posted(chat_body("a" * 100)))
        until(lambda: toy.worker._taken == 4)
        took = []
        with toy.client() as client:
            for _ in range(10):
                answer = client.post(CHAT, json=chat_body("a" * 200))
                assert answer.status_code == 429
                took.append(answer.elapsed.total_seconds())
        for sock in sockets:
            sock.close()
    assert sorted(took)[5] < 0.1


# --- time -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty() -> Iterator[Toy]:
    with running(Limits(max_rows=2, queue=2, timeout=0.4), Options(NAME, keep_alive=0.1)) as made:
        yield made


@pytest.mark.alone
def test_a_request_that_takes_too_long_is_a_504_and_its_row_is_free(hasty: Toy) -> None:
    with hasty.knobs.slow(PACE), hasty.client() as client:
        answer = client.post(CHAT, json=long_body())
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        until(lambda: not hasty.knobs.engines[-1].has_work, PACE + 0.2)
    hasty.settle()
    assert hasty.metric("cancelled_requests_total", reason="timeout") >= 1
    assert said(hasty, chat_body(max_tokens=2))


def test_a_stream_that_takes_too_long_ends_with_an_error_and_no_done(hasty: Toy) -> None:
    with hasty.knobs.slow(PACE), reading(hasty, long_body(stream=True)) as events:
        *said_so_far, last = events
    assert said_so_far
    assert last["error"]["code"] == "timeout"
    hasty.settle()


def test_a_stream_that_waits_is_kept_alive_by_comments(toy: Toy) -> None:
    lines = []
    with toy.client() as client:
        release = threading.Timer(0.5, toy.knobs.open.set)
        with toy.knobs.held():
            release.start()
            with client.stream("POST", CHAT, json=chat_body(stream=True)) as stream:
                for line in stream.iter_lines():
                    lines.append(line)
    release.join()
    first = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    comments = [line for line in lines[:first] if line.startswith(":")]
    assert len(comments) >= 3
    assert lines[-1] == "" or lines[-1] == "data: [DONE]"
    assert "data: [DONE]" in lines


# --- faults ---------------------------------------------------------------------------------------


def test_an_exception_in_a_stream_ends_that_stream_alone(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = said(toy, chat_body("other"))
    take = Reply.take
    taken = []

    def breaks(reply: Reply, chunk: Chunk) -> Any:
        if reply.call.body.user == "unlucky":
            taken.append(chunk)
            if len(taken) == 3:
                raise RuntimeError("planted secret")
        return take(reply, chunk)

    monkeypatch.setattr(Reply, "take", breaks)
    unlucky = long_body(stream=True, user="unlucky")
    with toy.knobs.slow(0.01), reading(toy, unlucky) as events:
        next(events)
        assert said(toy, chat_body("other")) == alone
        *_, last = events
    assert last["error"]["type"] == "server_error"
    assert "planted" not in json.dumps(last)
    taken.clear()
    with toy.client() as client:
        answer = client.post(CHAT, json=long_body(user="unlucky"))
    assert answer.status_code == 500
    assert "planted" not in answer.text


def test_an_error_of_one_row_ends_that_request_alone(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = said(toy, chat_body("other"))
    engine = toy.knobs.engines[-1]
    step = type(engine).step
    unlucky: list[int] = []

    def breaks(self: Engine) -> list[Chunk]:
        chunks = step(self)
        for i, chunk in enumerate(chunks):
            if chunk.index in unlucky and chunk.result is None:
                self.cancel(chunk.index)
                chunks[i] = Chunk(chunk.index, (), (), error=MemoryError("planted"))
                unlucky.clear()
        return chunks

    monkeypatch.setattr(type(engine), "step", breaks)
    with toy.knobs.slow(0.01), reading(toy, long_body(stream=True)) as events:
        next(events)
        (number,) = toy.worker._requests
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(said, toy, chat_body("other"))
            unlucky.append(number)
            *_, last = events
            assert other.result() == alone
    assert last["error"]["code"] == "out_of_memory"


class Panic(BaseException):
    """What a library in Rust raises where it gives up."""


@pytest.mark.parametrize("fault", [MemoryError("planted"), Panic("planted")])
def test_an_engine_that_fails_costs_what_ran_and_nothing_after_it(
    toy: Toy, fault: BaseException
) -> None:
    alone = said(toy, chat_body())
    faults = toy.metric("engine_faults_total")
    with toy.knobs.slow(PACE), toy.client() as client:
        toy.knobs.steps = 0
        with ThreadPoolExecutor(1) as pool, reading(toy, long_body(stream=True)) as events:
            whole = pool.submit(client.post, CHAT, json=long_body())
            next(events)
            until(lambda: len(toy.knobs.engines[-1].running) == 2)
            toy.knobs.fault = fault
            *_, last = events
            answer = whole.result()
    assert last["error"]["code"] == "engine_fault"
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert toy.metric("engine_faults_total") == faults + 1
    assert said(toy, chat_body()) == alone
    assert toy.worker.is_ready


def test_a_dead_engine_thread_is_told_and_refuses_what_comes() -> None:
    with running() as toy, toy.client() as client:
        toy.knobs.fault = SystemExit(1)
        answer = client.post(CHAT, json=chat_body())
        assert answer.status_code == 503
        until(lambda: toy.worker.state == "dead")
        for path, status in (("/ready", 503), ("/health", 503), ("/metrics", 200)):
            assert client.get(path).status_code == status
        for stream in (False, True):
            refused = client.post(CHAT, json=chat_body(stream=stream))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "not_ready"
        assert toy.metric("ready") == 0


def test_a_server_that_loads_answers_and_takes_nothing_yet() -> None:
    may_go_on = threading.Event()

    def slowly() -> Model:
        assert may_go_on.wait(10)
        return toy_model()

    with running(load=slowly, wait=False) as toy, toy.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json() == {"status": "loading"}
        assert client.get("/ready").status_code == 503
        for path, body in ((CHAT, chat_body()), ("/tokenize", {"prompt": "a"})):
            refused = client.post(path, json=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
        may_go_on.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert said(toy, chat_body())


# --- beside a long step ---------------------------------------------------------------------------


@pytest.mark.alone
def test_health_answers_while_the_engine_reads_a_long_prompt(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of a second and a half that holds the interpreter in bits, as a forward pass does."""
    engine = toy.knobs.engines[-1]
    step = type(engine).step
    matrix = torch.randn(256, 256)
    is_busy = threading.Event()

    def busy(self: Engine) -> list[Chunk]:
        if not is_busy.is_set():
            is_busy.set()
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                torch.mm(matrix, matrix)
                sum(range(2000))
            is_busy.clear()
            monkeypatch.undo()
        return step(self)

    monkeypatch.setattr(type(engine), "step", busy)
    with connected(toy) as sock, toy.client() as client:
        sock.sendall(posted(chat_body()))
        assert is_busy.wait(5)
        took = []
        while is_busy.is_set():
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            took.append(time.monotonic() - started)
            time.sleep(0.02)
        assert answer_from(sock).status == 200
    assert len(took) > 5
    assert sorted(took)[-2] < 0.1  # the very last may meet the step's end


def test_what_is_long_is_written_beside_the_event_loop(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of a million tokens, their log-probabilities: /health answers meanwhile."""
    writing = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            writing.append(threading.get_ident())
            return function(*arguments)

        return call

    assert toy.worker.model is not None
    tokenizer = toy.worker.model.tokenizer
    named = noted(tokenizer.convert_ids_to_tokens)
    with toy.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "convert_ids_to_tokens", named)
            client.post("/tokenize", json={"prompt": "abc", "return_token_strs": True})
        monkeypatch.setattr(Reply, "whole", noted(Reply.whole))
        answer = client.post(CHAT, json=chat_body(logprobs=True))
    assert answer.status_code == 200
    assert len(writing) == 4

    ran: Future[int] = Future()
    toy.loop.call_soon_threadsafe(lambda: ran.set_result(threading.get_ident()))
    assert ran.result(5) not in writing
