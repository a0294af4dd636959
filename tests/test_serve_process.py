"""`flashdraft serve` as a process: how it starts, what its signals do, what it survives."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any

import httpx2 as httpx
import psutil
import pytest
from conftest import SHAPE, tiny_model
from toy_folders import save_target
from toy_server import Toy, chat_body, events_of, running, until
from transformers import LlamaConfig

from flashdraft.cli import main
from flashdraft.serve.server import listen

CHAT = "/v1/chat/completions"
CONTEXT = 20_000  # a text that goes on for minutes
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a long context."""
    path = tmp_path_factory.mktemp("models") / "toy"
    model = tiny_model("llama", config=LlamaConfig(**SHAPE | {"max_position_embeddings": CONTEXT}))
    return save_target(path, model=model.float())


@dataclass
class Running:
    """A server that is a process of its own."""

    process: subprocess.Popen[bytes]
    url: str

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def status(self, path: str = "/ready") -> int:
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


def free_port() -> int:
    with listen("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
    return port


@contextmanager
def serving(
    target: Path,
    *options: str,
    port: int | None = None,
    out: IO[bytes] | int = subprocess.DEVNULL,
    err: IO[bytes] | int = subprocess.DEVNULL,
    **environment: str,
) -> Iterator[Running]:
    """A server of this folder, which may not be ready yet; killed at the end if it still runs."""
    port = port or free_port()
    command = [sys.executable, "-m", "flashdraft", "serve", str(target), "--port", str(port)]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        [*command, "--draft", "autoregressive", *options], stdout=out, stderr=err, env=own
    )
    try:
        yield Running(process, f"http://127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def await_ready(server: Running) -> None:
    while server.status() != 200 and server.process.poll() is None:
        time.sleep(0.1)
    assert server.process.poll() is None


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True, **fields}


def text_of_a_chat(server: Running, **headers: str) -> str:
    with server.client(headers=headers) as client:
        answer = client.post(CHAT, json=body(max_tokens=20))
        return str(answer.json()["choices"][0]["message"]["content"])


# --- signals --------------------------------------------------------------------------------------


def test_one_sigterm_lets_texts_end_and_a_second_one_ends_them(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    err = tmp_path / "err"
    with (
        out.open("wb") as to_out,
        err.open("wb") as to_err,
        serving(folder, out=to_out, err=to_err) as server,
        server.client() as client,
    ):
        await_ready(server)
        endless = body(max_tokens=CONTEXT - 100, stream=True)
        short = body(max_tokens=300, stream=True)
        with (
            client.stream("POST", CHAT, json=endless) as goes_on,
            client.stream("POST", CHAT, json=short) as ends,
        ):
            events_of_both = events_of(goes_on.iter_lines()), events_of(ends.iter_lines())
            for events in events_of_both:
                next(events)
            children = psutil.Process(server.process.pid).children(recursive=True)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.status() == 503)
            with server.client() as other:
                refused = other.post(CHAT, json=body(max_tokens=2))
                assert other.get("/health").status_code == 200
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"]
            *_, finish, done = events_of_both[1]
            assert done == "[DONE]"
            assert finish["choices"][0]["finish_reason"] == "length"

            server.process.send_signal(signal.SIGTERM)
            *_, finish, done = events_of_both[0]
            assert done == "[DONE]"
            assert finish["choices"][0]["finish_reason"] == "abort"
        assert server.process.wait(20) == 0
        assert not [child for child in children if child.is_running()]

    assert out.read_text().splitlines() == [f"toy is served at {server.url}"]
    lines = [json.loads(line) for line in err.read_text().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    counts = [line["completion_tokens"] for line in lines if "completion_tokens" in line]
    assert 300 in counts
    assert "hello" not in err.read_text()


@pytest.mark.parametrize("stream", [True, False])
def test_the_drain_timeout_ends_what_runs(stream: bool) -> None:
    with running(drain_timeout=0.3) as toy, ThreadPoolExecutor(1) as pool:
        with toy.knobs.slow(0.05):
            asked = pool.submit(_answered, toy, chat_body(max_tokens=200, stream=stream))
            until(lambda: toy.knobs.steps > 3)
            toy.loop.call_soon_threadsafe(toy.server.end)
            reason, num_tokens = asked.result()
        assert reason == "abort"
        assert 0 < num_tokens < 100
        until(lambda: toy.worker.state == "dead")


def _answered(toy: Toy, asked: dict[str, Any]) -> tuple[str, int]:
    """The finish reason of an answer, and its number of tokens."""
    with toy.client() as client:
        if not asked["stream"]:
            whole = client.post(CHAT, json=asked).json()
            return whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]
        asked["stream_options"] = {"include_usage": True}
        with client.stream("POST", CHAT, json=asked) as stream:
            *_, finish, usage, done = events_of(stream.iter_lines())
        assert done == "[DONE]"
        return finish["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]


# --- what a server survives -----------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_a_model_that_is_removed_and_a_neighbour_that_is_killed(
    folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "removed"
    shutil.copytree(folder, own)
    port = free_port()
    as_owner = {"authorization": f"Bearer {KEY}"}
    with (
        open("/dev/full", "wb") as full,
        serving(own, out=full, err=full, FLASHDRAFT_API_KEY=KEY) as server,
    ):
        with serving(folder, port=port) as neighbour:
            await_ready(server)
            await_ready(neighbour)
            shutil.rmtree(own)
            texts = [text_of_a_chat(server, **as_owner), text_of_a_chat(neighbour)]
            lines = _until_killed(neighbour)
            assert lines
            assert lines[-1] != "data: [DONE]"

        with serving(folder, port=port) as again:
            await_ready(again)
            texts += [text_of_a_chat(server, **as_owner), text_of_a_chat(again)]
        assert len(set(texts)) == 1

        with server.client(headers=as_owner) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "removed"
            figures = client.get("/metrics").text.splitlines()
        lost = [line for line in figures if line.startswith("flashdraft_lost_log_lines ")]
        assert float(lost[0].split()[1]) >= 2
        assert KEY not in " ".join(psutil.Process(server.process.pid).cmdline())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def _until_killed(server: Running) -> list[str]:
    """The lines of a stream whose server is killed in the middle of it."""
    lines: list[str] = []
    asked = body(max_tokens=CONTEXT - 100, stream=True)
    with (
        suppress(httpx.TransportError),
        server.client() as client,
        client.stream("POST", CHAT, json=asked) as stream,
    ):
        for line in stream.iter_lines():
            lines += [line] if line else []
            if len(lines) == 5:
                server.process.kill()
    return lines


# --- what it refuses at its start -----------------------------------------------------------------


@pytest.fixture
def _loggers() -> Iterator[None]:
    """A server takes the root logger; pytest gets it back."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines of a command that does not start."""
    assert main(["serve", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    return lines


@pytest.mark.usefixtures("_loggers")
def test_a_port_in_use_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        started = time.monotonic()
        error, hint = complaint(capsys, "--port", port)
        assert time.monotonic() - started < 5
    assert f"127.0.0.1:{port}" in error
    assert "--port" in hint


@pytest.mark.usefixtures("_loggers")
@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_host_that_is_no_name_is_told(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHDRAFT_API_KEY", "key")
    error, hint = complaint(capsys, "--host", host, "--port", "0")
    assert host in error
    assert "--host" in hint


@pytest.mark.usefixtures("_loggers")
def test_a_model_that_cannot_be_read_ends_the_server_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path
) -> None:
    error, _ = complaint(capsys, str(tmp_path / "nothing"), "--port", "0")
    assert "nothing" in error
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error, _ = complaint(capsys, str(tmp_path / "cut"), "--port", "0")
    assert "model.safetensors" in error


@pytest.mark.usefixtures("_loggers")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", socket.gethostname()])
def test_an_address_that_others_reach_needs_a_key(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHDRAFT_API_KEY", raising=False)
    error, hint = complaint(capsys, "--host", host, "--port", "0")
    assert "no API key" in error
    assert "FLASHDRAFT_API_KEY" in hint


def test_a_missing_extra_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            error, hint = complaint(capsys)
        assert package in error
        assert "flashdraft[serve]" in hint


def test_an_empty_key_file_and_a_key_with_a_space_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text("")
    error, _ = complaint(capsys, "--api-key-file", str(file))
    assert "holds no key" in error
    file.write_text("one two")
    error, _ = complaint(capsys, "--api-key-file", str(file))
    assert "one two" not in error
