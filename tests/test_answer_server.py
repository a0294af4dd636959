"""Answers from a server: the same lines in the file as from a target in this process; a server that
is busy, fails or refuses is named, and what it has answered is kept.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import EOS
from toy_prompts import TALK, language_model, one_line, prompt_file, write_lines

from flashdraft.cli import main
from flashdraft.cli import options as cli_options
from flashdraft.errors import DataError, FlashDraftError, InvalidParameter
from flashdraft.train import regenerate as stage
from flashdraft.train.features import ShardWriter, encode
from flashdraft.train.prompts import read_jsonl
from flashdraft.train.regenerate import Server, mixed, regenerate
from flashdraft.types import SamplingParams

PARAMS = SamplingParams(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=5)
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


def completion(body: dict[str, Any], **message: Any) -> tuple[int, Any]:
    content = "to " + body["messages"][-1]["content"]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": "stop",
    }
    return 200, {"choices": [choice], "usage": {"completion_tokens": 7}}


class Api:
    """A server that keeps what it was asked and answers as it is told."""

    def __init__(self) -> None:
        self.reply: Reply = completion
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.bodies.append(body)
                api.headers.append((self.path, self.headers["Authorization"]))
                status, content = api.reply(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(
                    (content if isinstance(content, str) else json.dumps(content)).encode()
                )

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr(stage._AGAIN, "backoff_factor", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    api = Api()
    thread = threading.Thread(target=api.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield api
    api.http.shutdown()
    thread.join()
    api.http.server_close()


def test_server_answers_in_the_same_lines(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = [
        {"source": "s", "row": 0, "prompt": "a", "thinking": False},
        {"source": "s", "row": 1, "prompt": TALK},
    ]
    path, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "answers.jsonl"
    server = Server(api.url + "/", "big", max_rows=2)
    assert (
        regenerate(
            server,
            path,
            out,
            params=replace(PARAMS, stop=("END",), presence_penalty=0.5),
            quiet=True,
        )
        == 2
    )
    answers = [
        row | {"response": f"to {text}", "finish": "stop", "num_tokens": 7}
        for row, text in zip(rows, "ac", strict=True)
    ]
    assert sorted(read_jsonl(out), key=lambda row: int(row["row"])) == answers
    assert set(api.headers) == {("/v1/chat/completions", "Bearer secret")}
    common = {
        "model": "big",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 12,
        "stop": ["END"],
        "presence_penalty": 0.5,
    }
    assert sorted(api.bodies, key=lambda body: int(body["seed"])) == [
        common
        | {
            "seed": 5,
            "messages": [{"role": "user", "content": "a"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        common | {"seed": 6, "messages": TALK},
    ]
    lm = language_model()
    tokens, num_prompt = encode(lm, answers[0])
    assert tokens[:num_prompt] == lm.encode("a", thinking=False)
    assert tokens[num_prompt:] == [*lm.tokenizer.encode("to a", add_special_tokens=False), EOS]


def test_greedy_share_goes_to_the_server(tmp_path: Path, api: Api) -> None:
    path = prompt_file(tmp_path, [str(n) for n in range(12)])
    regenerate(
        Server(api.url, "big", 3),
        path,
        tmp_path / "out.jsonl",
        params=mixed(PARAMS, 0.5),
        quiet=True,
    )
    assert {body["temperature"] for body in api.bodies} == {0.0, 0.7}
    assert {body["seed"] for body in api.bodies} == set(range(5, 17))
    assert all("stop" not in body and "chat_template_kwargs" not in body for body in api.bodies)
    assert {authorization for _, authorization in api.headers} == {None}


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_asked_again(tmp_path: Path, api: Api, status: int) -> None:
    path = prompt_file(tmp_path, "abc")
    api.reply = lambda body: completion(body) if len(api.bodies) > 1 else (status, "busy")
    assert (
        regenerate(
            Server(api.url, "big", 1), path, tmp_path / "out.jsonl", params=PARAMS, quiet=True
        )
        == 3
    )
    assert sorted(api.asked()) == ["a", "a", "b", "c"]


FAILURES: dict[str, tuple[Reply, str, int]] = {
    "always-500": (lambda body: (500, "out of\nmemory"), "500 out of memory", 4),
    "unknown-model": (lambda body: (404, {"error": "no model"}), '404 {"error": "no model"}', 1),
    "no-key": (lambda body: (401, "no key"), "401 no key", 1),
    "no-json": (lambda body: (200, "<html>"), "not a chat completion (JSONDecodeError", 1),
    "other-json": (lambda body: (200, {"choices": []}), "not a chat completion (IndexError", 1),
    "a-list": (lambda body: (200, []), "not a chat completion (TypeError", 1),
    "thoughts-apart": (
        lambda body: completion(body, reasoning_content="hm"),
        "without a reasoning parser",
        1,
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_server_that_fails_is_named_with_the_cause_and_finished_answers_are_kept(
    tmp_path: Path, api: Api, case: str
) -> None:
    failure, expected, count = FAILURES[case]
    path, out = prompt_file(tmp_path, "abcdefgh"), tmp_path / "out.jsonl"
    api.reply = lambda body: (
        failure(body) if body["messages"][-1]["content"] == "d" else completion(body)
    )
    with pytest.raises(FlashDraftError) as error:
        regenerate(Server(api.url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert one_line(error).startswith(f"`{api.url}` gave no answer to {path}, line 4: ")
    assert expected in one_line(error)
    assert "`big`" in str(error.value)
    assert api.asked() == [*"abc", *"d" * count]  # nothing new is sent after it
    assert [row["prompt"] for row in read_jsonl(out)] == [*"abc"]
    api.reply, before = completion, len(api.bodies)
    assert regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True) == 5
    assert sorted(api.asked()[before:]) == [*"defgh"]


def test_answers_under_way_when_another_fails_are_kept(tmp_path: Path, api: Api) -> None:
    path, out = prompt_file(tmp_path, "abc"), tmp_path / "out.jsonl"
    under_way, failed = threading.Event(), threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][-1]["content"] == "a":
            assert under_way.wait(10)
            failed.set()
            return 404, "no"
        under_way.set()
        assert failed.wait(10)
        return completion(body)

    api.reply = reply
    with pytest.raises(FlashDraftError, match="404 no"):
        regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True)
    assert "b" in {row["prompt"] for row in read_jsonl(out)}


def test_answers_of_a_server_are_written_as_they_end(tmp_path: Path, api: Api) -> None:
    path, out = prompt_file(tmp_path, "abcd"), tmp_path / "out.jsonl"
    written: list[int] = []

    def lines_written() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        give_up = time.monotonic() + 60
        while len(written) == 3 and not lines_written() and time.monotonic() < give_up:
            time.sleep(0.01)  # the answers before are being written
        written.append(lines_written())
        return completion(body)

    api.reply = reply
    regenerate(Server(api.url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert written[-1] > 0


def test_dead_port_is_named_after_its_retries(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(stage._AGAIN, "backoff_factor", 0.1)
    monkeypatch.setattr("time.sleep", pauses.append)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/v1"
    path, out = prompt_file(tmp_path, "ab"), tmp_path / "out.jsonl"
    with pytest.raises(FlashDraftError) as error:
        regenerate(Server(url, "big", 1), path, out, params=PARAMS, quiet=True)
    assert f"`{url}` gave no answer" in one_line(error)
    assert "refused" in one_line(error)
    assert pauses == [0.2, 0.4]
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


LEFT_OUT: dict[str, tuple[Reply, str]] = {
    "context": (
        lambda body: (400, {"error": {"message": "This model's maximum context length is 4096"}}),
        "400",
    ),
    "roles": (lambda body: (400, "roles must alternate"), "400 roles must alternate"),
    "too-large": (lambda body: (413, "entity too large"), "413 entity too large"),
    "unprocessable": (lambda body: (422, {"detail": "no"}), "422"),
    "no-text": (lambda body: completion(body, content=None), "finish_reason 'stop'"),
    "calls-a-tool": (
        lambda body: completion(body, content=None, tool_calls=[{"id": "1"}]),
        "no text for it",
    ),
    "half-a-character": (lambda body: completion(body, content="\ud800"), "half a character"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_prompt_that_a_server_refuses_is_left_out_and_named(
    tmp_path: Path, api: Api, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    refusal, expected = LEFT_OUT[case]
    path, out = prompt_file(tmp_path, "abc"), tmp_path / "out.jsonl"
    api.reply = lambda body: (
        refusal(body) if body["messages"][0]["content"] == "b" else completion(body)
    )
    for new in (2, 0):
        assert regenerate(Server(api.url, "big", 2), path, out, params=PARAMS, quiet=True) == new
        told = capsys.readouterr().err
        assert told.startswith(f"1 prompt left out: {path}, line 2: ")
        assert expected in told
    assert {row["prompt"] for row in read_jsonl(out)} == {"a", "c"}
    api.reply = refusal
    with pytest.raises(DataError, match="no prompt could be answered: 3 prompts left out"):
        regenerate(
            Server(api.url, "big", 2), path, tmp_path / "none.jsonl", params=PARAMS, quiet=True
        )


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls"])
def test_text_that_a_filter_or_a_call_cut_is_no_answer(
    tmp_path: Path, api: Api, finish: str
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        status, content = completion(body)
        content["choices"][0]["finish_reason"] = (
            finish if body["messages"][0]["content"] == "b" else "stop"
        )
        return status, content

    api.reply = reply
    assert (
        regenerate(
            Server(api.url, "big", 2),
            prompt_file(tmp_path, "abc"),
            tmp_path / "o",
            params=PARAMS,
            quiet=True,
        )
        == 2
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5),
        ("min_p", 0.1),
        ("ignore_eos", True),
        ("repetition_penalty", 1.2),
        ("logit_bias", {3: 1.0}),
        ("logprobs", True),
    ],
)
def test_sampling_that_the_api_has_not_is_refused(
    tmp_path: Path, api: Api, name: str, value: Any
) -> None:
    params = replace(PARAMS, **{name: value})
    with pytest.raises(InvalidParameter, match=f"^{name} is set"):
        regenerate(
            Server(api.url, "big", 2),
            prompt_file(tmp_path, "ab"),
            tmp_path / "out.jsonl",
            params=params,
            quiet=True,
        )
    assert api.bodies == []


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc", ""])
def test_url_of_no_web_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^url is"):
        Server(url, "big", 1)


def test_server_keeps_no_features(tmp_path: Path, api: Api) -> None:
    shards = ShardWriter(language_model(), tmp_path / "kept", layers=(1,), max_length=64)
    server, path = Server(api.url, "big", 1), prompt_file(tmp_path, "a")
    with pytest.raises(InvalidParameter, match="no features to keep"):
        regenerate(server, path, tmp_path / "out.jsonl", params=PARAMS, shards=shards, quiet=True)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http:///v1"]
)
def test_url_that_cannot_be_reached_is_named(tmp_path: Path, api: Api, url: str) -> None:
    with pytest.raises(FlashDraftError) as error:
        regenerate(
            Server(url, "big", 1),
            prompt_file(tmp_path, "a"),
            tmp_path / "out.jsonl",
            params=PARAMS,
            quiet=True,
        )
    assert url in one_line(error)


def test_command_asks_a_server_and_loads_no_target(
    tmp_path: Path, api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a target was loaded")

    monkeypatch.setattr(cli_options, "load", loaded)
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path, "abc")
    line = ["regenerate", "prompts.jsonl", "--out", "out.jsonl", "--url", api.url]
    model = ["--model", "big", "--temperature", "0.5"]
    assert main([*line, *model, "--limit", "2", "--greedy-share", "1", "--max-rows", "2"]) == 0
    assert capsys.readouterr().out == "2 new answers in out.jsonl\n"
    assert {body["temperature"] for body in api.bodies} == {0.0}
    refused = [
        (["--keep-features", "kept"], "keep_features"),
        (["--soft-labels"], "soft_labels"),
        (["--target", "gpt2"], "target"),
        (["--draft", "prompt_lookup"], "draft"),
        (["--block-size", "4"], "block_size"),
        (["--dtype", "float32"], "dtype"),
        (["--max-rows", "0"], "max_rows"),
        (["--greedy-share", "2"], "greedy_share"),
    ]
    for words, name in refused:
        assert main([*line, *model, *words]) == 1
        assert capsys.readouterr().err.startswith(f"error: {name} is ")
    for words in (line, [*line[:4], *model]):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith("error: --url and --model go together\nhint: ")
    assert len(api.bodies) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.jsonl",
        "out.jsonl",
        "out.jsonl.run.json",
    }
