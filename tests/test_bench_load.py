"""The load test: who is asked what, when, and how often; what a line and a row of the table say;
servers that are not there, refuse, lie or break off.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from flashdraft.bench.client import Api, ServerError
from flashdraft.bench.load import LoadConfig, run_load
from flashdraft.bench.load_report import (
    LOAD_COLUMNS,
    bounds,
    full_load_rate,
    read_load,
    summarise_load,
)
from flashdraft.cli import main
from flashdraft.errors import DataError, InvalidParameter

Body = dict[str, Any]
WORDS = ("One", " two", " three", " four")
DRAFTS = {"num_spec_steps": 2, "mean_acceptance_length": 2.5}


def chunk(text: str | None, finish: str | None = None) -> Body:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def events(body: Body) -> Iterator[Body | bytes]:
    """A stream as ours sends it: a role, comments, text, a finish, usage, an end."""
    yield {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
    for word in WORDS[: body["max_tokens"]]:
        yield b": keep-alive\n\n"
        yield chunk(word)
    yield chunk(None, "length")
    num_tokens = min(len(WORDS), body["max_tokens"])
    usage = {"prompt_tokens": 9, "completion_tokens": num_tokens}
    usage["prompt_tokens_details"] = {"cached_tokens": 3}
    last: Body = {"choices": [], "usage": usage}
    if body.get("drafting") in ("on", "auto"):
        last["metrics"] = {"speculative_decoding": DRAFTS}
    yield last
    yield b"data: [DONE]\n\n"


Answer = Callable[[Body], Iterator[Body | bytes]]


class FakeServer:
    """A server that keeps what it was asked, and answers as it is told."""

    def __init__(self) -> None:
        self.answer: Answer = events
        self.refusal: Callable[[Body], tuple[int, Body] | None] = lambda body: None
        self.models = ["toy"]
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.piece = 1 << 16  # bytes that are sent at a time
        self.hangs_up = False  # without a word, after an answer
        self.most_at_once = 0
        self._running = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                entries = [{"id": name} for name in server.models]
                self.page(200, {"data": entries} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.keys.append(self.headers["Authorization"])
                refused = server.refusal(body)
                if refused is not None:
                    self.page(*refused)
                    return
                with server._lock:
                    server.bodies.append(body)
                    server._running += 1
                    server.most_at_once = max(server.most_at_once, server._running)
                self.stream(body)

            def stream(self, body: Body) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                content = b""
                for event in server.answer(body):
                    is_raw = isinstance(event, bytes)
                    content += event if is_raw else b"data: %s\n\n" % json.dumps(event).encode()
                with server._lock:
                    server._running -= 1
                for start in range(0, len(content), server.piece):
                    piece = content[start : start + server.piece]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                with suppress(OSError):  # who asked may have hung up
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection |= server.hangs_up

            def page(self, status: int, content: Body) -> None:
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    fake = FakeServer()
    thread = threading.Thread(target=fake.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.http.shutdown()
    thread.join()
    fake.http.server_close()


@pytest.fixture
def api(server: FakeServer) -> Iterator[Api]:
    with closing(Api(server.url)) as made:
        yield made


@pytest.fixture
def config(tmp_path: Path) -> LoadConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"task": "chat", "prompt": f"Say {n}"}) for n in range(5)]
    prompts.write_text("\n".join(lines))
    out = tmp_path / "load.jsonl"
    return LoadConfig(prompts, out, concurrency="1,3", repeats=2, max_new_tokens=4)


def told(body: Body) -> str:
    return str(body["messages"][-1]["content"])


def failing(api: Api) -> ServerError:
    """What asking it raises."""
    with pytest.raises(ServerError) as error:
        api.ask({"max_tokens": 4})
    return error.value


# --- who is asked what --------------------------------------------------------------------------


def test_every_mode_is_asked_the_same_prompts_in_turns_that_rotate(
    server: FakeServer, config: LoadConfig
) -> None:
    assert run_load(server.url, config) == 2 * 3 * (2 + 6)
    _, lines = read_load(config.out)
    turns: dict[Any, list[int]] = {}
    for line in lines:
        turn = (line["repeat"], line["streams"], line["drafting"])
        turns.setdefault(turn, []).append(line["prompt"])

    asked = {turn: sorted(numbers) for turn, numbers in turns.items()}
    for (repeat, streams, _), numbers in asked.items():
        assert numbers == asked[repeat, streams, "off"]
    assert asked[0, 1, "off"] == [0, 1]
    # a level goes on in the file, and behind its end begins again
    assert asked[0, 3, "off"] == [0, 1, 2, 2, 3, 4]
    assert asked[1, 1, "off"] == [3, 4]

    orders = [mode for _, _, mode in turns]
    assert orders[:3] == ["off", "on", "auto"]
    assert orders[3:6] == ["on", "auto", "off"]
    assert {tuple(orders[i : i + 3]) for i in range(0, 12, 3)} >= {("auto", "off", "on")}


def test_requests_say_what_was_asked_for_and_nothing_else(
    server: FakeServer, config: LoadConfig
) -> None:
    run_load(server.url, dataclasses.replace(config, seed=7, repeats=1))
    warm, measured = server.bodies[:3], server.bodies[3:]
    assert [body["drafting"] for body in warm] == ["off", "on", "auto"]
    for body in measured:
        number = int(told(body).split()[1])
        salt = body.pop("cache_salt")
        mode = body.pop("drafting")
        assert mode in ("off", "on", "auto")
        assert body == {
            "model": "toy",
            "messages": [{"role": "user", "content": f"Say {number}"}],
            "max_tokens": 4,
            "temperature": 0.0,
            "seed": 7 + number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert len(salt) == 32
    assert len(measured) == 3 * (2 + 6)


def test_a_server_without_our_fields_is_not_sent_them(
    server: FakeServer, config: LoadConfig
) -> None:
    run_load(server.url, dataclasses.replace(config, drafting="none", reuse=True, ignore_eos=True))
    for body in server.bodies:
        assert not {"drafting", "cache_salt"} & body.keys()
        assert body["ignore_eos"] is True
    _, lines = read_load(config.out)
    rows = summarise_load(lines)
    assert [(row.streams, row.drafting, row.ratio) for row in rows] == [
        (1, "none", None),
        (3, "none", None),
    ]


def test_no_two_requests_share_a_salt(server: FakeServer, config: LoadConfig) -> None:
    run_load(server.url, config)
    salts = [body["cache_salt"] for body in server.bodies]
    assert len(set(salts)) == len(salts)


def test_so_many_streams_ask_at_a_time_and_each_goes_on_when_its_answer_ends(
    server: FakeServer, config: LoadConfig
) -> None:
    together = threading.Barrier(3, timeout=10)  # broken unless three are there at once

    def wait_for_others(body: Body) -> Iterator[Body | bytes]:
        together.wait()
        yield from events(body)

    quick = dataclasses.replace(config, concurrency="3", drafting="off", repeats=1)
    run_load(server.url, dataclasses.replace(quick, concurrency="1"))
    assert server.most_at_once == 1

    # the request that warms up comes alone
    server.answer = _after(1, events, wait_for_others)
    run_load(server.url, dataclasses.replace(quick, out=config.out.with_name("3.jsonl")))
    assert server.most_at_once == 3


def _after(count: int, first: Answer, then: Answer) -> Answer:
    """`first` to so many requests, `then` to the others."""
    asked = []

    def answer(body: Body) -> Iterator[Body | bytes]:
        asked.append(body)
        return first(body) if len(asked) <= count else then(body)

    return answer


# --- what a line says ---------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 16, 7, 1])
def test_a_stream_is_read_however_it_is_cut(server: FakeServer, piece: int) -> None:
    server.piece = piece
    with closing(Api(f"{server.url}/v1/")) as api:
        reply = api.ask({"max_tokens": 4, "drafting": "on"})
    assert reply.text == "One two three four"
    assert reply.finish == "length"
    assert (reply.num_tokens, reply.num_prompt_tokens, reply.num_cached) == (4, 9, 3)
    assert reply.drafts == DRAFTS
    assert len(reply.arrivals) == 4  # neither the role nor the finish is text
    assert reply.arrivals == sorted(reply.arrivals)
    assert reply.arrivals[0] > 0
    assert reply.arrivals[-1] <= reply.seconds


def test_the_file_tells_where_it_comes_from_and_holds_no_key(
    server: FakeServer, config: LoadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " s3cret ")
    run_load(server.url, config)
    assert set(server.keys) == {"Bearer s3cret"}
    header, lines = read_load(config.out)
    assert header["kind"] == "load"
    assert (header["url"], header["model"]) == (server.url, "toy")
    assert header["answers"] == len(lines) == 48
    assert header["config"]["concurrency"] == "1,3"
    assert header.keys() >= {"command", "commit", "versions", "device", "time", "prompts_sha256"}
    assert "s3cret" not in config.out.read_text()

    line = next(line for line in lines if line["drafting"] == "on")
    assert line["error"] is None
    assert (line["num_tokens"], line["num_cached"], line["finish"]) == (4, 3, "length")
    assert line["drafts"] == DRAFTS
    assert len(line["arrivals"]) == 4
    assert line["seconds"] >= line["arrivals"][-1]


def test_a_connection_that_the_server_closed_meanwhile_is_made_again(
    server: FakeServer, api: Api
) -> None:
    server.hangs_up = True
    api.ask({"max_tokens": 2})
    assert api.ask({"max_tokens": 2}).num_tokens == 2


# --- what the table says ------------------------------------------------------------------------


def line(mode: str = "off", streams: int = 2, **fields: Any) -> Body:
    made = {"task": "chat", "prompt": 0, "streams": streams, "drafting": mode, "repeat": 0}
    made |= {"started": 0.0, "seconds": 1.0, "arrivals": [0.25, 0.5, 1.0], "num_tokens": 3}
    return made | {"text": "a", "error": None} | fields


def test_throughput_is_that_of_the_time_in_which_all_streams_are_busy() -> None:
    # stream 1: 0 to 1, then 1 to 4; stream 2: 0 to 2, then nothing is left to ask
    lines = [
        line(seconds=1.0, arrivals=[0.5, 1.0], num_tokens=10),
        line(seconds=2.0, arrivals=[1.0, 2.0], num_tokens=20),
        line(started=1.0, seconds=3.0, arrivals=[1.0, 2.0, 3.0], num_tokens=30),
    ]
    assert full_load_rate(lines) == (10 + 20 + 10) / 2.0
    whole = sum(each["num_tokens"] for each in lines) / 4.0  # what would be told otherwise
    assert whole == 15.0 != full_load_rate(lines)


def test_a_row_tells_medians_and_95th_percentiles_of_waits() -> None:
    lines = []
    for number in range(1, 21):
        first = number / 1000
        arrivals = [first, first + 0.010, first + 0.010 + 0.002 * number]
        lines.append(line(prompt=number, arrivals=arrivals, num_tokens=5))
    (row,) = summarise_load(lines)
    assert (row.requests, row.failed) == (20, 0)
    assert row.first == pytest.approx(10.5)
    assert row.first_p95 == pytest.approx(19.0)
    assert row.token == pytest.approx((10 + 21) / 4)
    assert row.token_p95 == pytest.approx((10 + 38) / 4)
    assert row.gap == pytest.approx(40.0)
    assert len(row.cells) == len(LOAD_COLUMNS)
    assert row.cells[LOAD_COLUMNS.index("ratio")] == "-"


def paired(gains: list[float], drift: list[float]) -> list[Body]:
    """Turns of `off` and `auto`, on a machine whose speed drifts from repeat to repeat."""
    lines = []
    for repeat, (gain, speed) in enumerate(zip(gains, drift, strict=True)):
        lines.append(line("off", 1, repeat=repeat, seconds=1 / speed, arrivals=[1 / speed]))
        seconds = 1 / (speed * gain)
        lines.append(line("auto", 1, repeat=repeat, seconds=seconds, arrivals=[seconds]))
    return lines


def test_a_ratio_is_made_of_turns_side_by_side_so_that_drift_does_not_widen_it() -> None:
    gains = [1.2, 1.25, 1.15, 1.2]
    lines = paired(gains, [1.0, 2.0, 0.5, 4.0])
    off, auto = summarise_load(lines)
    assert off.ratio is None
    assert auto.ratio == pytest.approx(math.prod(gains) ** 0.25)
    assert auto.lower is not None
    assert auto.upper is not None
    assert 1.1 < auto.lower < auto.ratio < auto.upper < 1.3

    # a pair of other repeats is none: the planted fault has bounds that say nothing
    swapped = []
    for each in lines:
        is_auto = each["drafting"] == "auto"
        swapped.append(each | {"repeat": (each["repeat"] + is_auto) % 4})
    wrong = summarise_load(swapped)[1]
    assert wrong.lower is not None
    assert wrong.lower < 0.5


@pytest.mark.parametrize("count", [2, 3, 10, 31])
def test_bounds_are_students(count: int) -> None:
    ratios = [1.0 + 0.1 * math.sin(number) for number in range(count)]
    logarithms = [math.log(ratio) for ratio in ratios]
    middle = sum(logarithms) / count
    spread = math.sqrt(sum((value - middle) ** 2 for value in logarithms) / (count - 1))
    margin = student.ppf(0.95, count - 1) * spread / math.sqrt(count)
    found = bounds(ratios)
    assert found is not None
    assert found == pytest.approx((math.exp(middle - margin), math.exp(middle + margin)), rel=1e-4)
    assert bounds(ratios[:1]) is None


def test_texts_are_compared_prompt_by_prompt() -> None:
    lines = [line("off", prompt=n, text=str(n)) for n in range(4)]
    lines += [line("on", prompt=n, text=str(n) if n else "other") for n in range(4)]
    off, on = summarise_load(lines)
    assert off.same is None
    assert on.same == 0.75
    assert summarise_load(lines, base="on")[0].same == 0.75


def test_tau_is_the_mean_of_what_the_server_tells() -> None:
    lines = [line("on", drafts={"mean_acceptance_length": tau}) for tau in (2.0, 3.0)]
    lines += [line("off", drafts=None)]
    off, on = summarise_load(lines)
    assert off.tau is None
    assert on.tau == 2.5


# --- what goes wrong ----------------------------------------------------------------------------


def test_no_server_is_one_line(config: LoadConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", "http://127.0.0.1:1", "--prompts", str(config.prompts)]
    assert main([*words, "--out", str(config.out)]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: no answer from `http://127.0.0.1:1`")
    assert "flashdraft serve" in hint
    assert not config.out.exists()


URLS = ["127.0.0.1:8000", "ftp://host", "http://", "http://h:99999", "http://h:0", "http://[::1"]
URLS += ["http://me:key@h", "http://h/v1?key=1", "http://h/v1#x", "http://h\u00e9", "http://h/a b"]


@pytest.mark.parametrize("url", [*URLS, ""])
def test_no_url_is_refused_by_name(url: str, config: LoadConfig) -> None:
    with pytest.raises(InvalidParameter, match=r"^url is ") as error:
        run_load(url, config)
    assert error.value.option == "url"


def test_a_missing_key_is_hinted_at(server: FakeServer, config: LoadConfig) -> None:
    server.refusal = lambda body: (401, {"error": {"message": "no key", "code": "x"}})
    with pytest.raises(ServerError, match="refuses with 401: no key") as error:
        run_load(server.url, config)
    assert "OPENAI_API_KEY" in str(error.value.hint)
    assert not config.out.exists()


@pytest.mark.parametrize("key", ["s3cret\nother", "s3cr\u00e9t", "s3cr\u4e00t"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(
    server: FakeServer, api: Api, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    error = failing(api)
    assert "OPENAI_API_KEY" in error.args[0]
    assert key not in f"{error.args[0]} {error.hint}"


def test_a_host_that_has_no_name_is_one_line() -> None:
    with closing(Api("http://a..b")) as api, pytest.raises(ServerError, match="no answer from"):
        api.get("/models")


def test_a_model_must_be_one_of_those_that_it_serves(
    server: FakeServer, config: LoadConfig
) -> None:
    with pytest.raises(ServerError, match="serves `toy`, not `other`"):
        run_load(server.url, dataclasses.replace(config, model="other"))
    server.models = ["a", "b"]
    with pytest.raises(ServerError, match="serves `a`, `b`") as error:
        run_load(server.url, config)
    assert "--model" in str(error.value.hint)
    run_load(server.url, dataclasses.replace(config, model="b"))
    assert {body["model"] for body in server.bodies} == {"b"}


@pytest.mark.parametrize(
    ("name", "way"), [("cache_salt", "--reuse"), ("drafting", "none"), ("ignore_eos", "leave")]
)
def test_a_field_that_it_does_not_know_is_hinted_at(
    server: FakeServer, config: LoadConfig, name: str, way: str
) -> None:
    server.refusal = lambda body: (400, {"error": {"message": f"`{name}` is no field"}})
    with pytest.raises(ServerError, match=name) as error:
        run_load(server.url, config)
    assert way in str(error.value.hint)
    assert not config.out.exists()


def test_requests_that_fail_have_their_lines_and_are_told(
    server: FakeServer, config: LoadConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(body: Body) -> tuple[int, Body] | None:
        is_bad = told(body) == "Say 1" and body["max_tokens"] == 4 and len(server.bodies) > 3
        return (429, {"error": {"message": "the queue is full"}}) if is_bad else None

    server.refusal = full
    run_load(server.url, config)
    assert "requests failed: " in capsys.readouterr().err
    _, lines = read_load(config.out)
    failed = [one for one in lines if one["error"]]
    assert failed
    assert {one["prompt"] for one in failed} == {1}
    assert all("429: the queue is full" in one["error"] for one in failed)
    rows = summarise_load(lines)
    assert sum(row.failed for row in rows) == len(failed)
    assert all(row.tokens_per_second > 0 for row in rows)


def ends_early(body: Body) -> Iterator[Body | bytes]:
    yield chunk("One")


def ends_with_an_error(body: Body) -> Iterator[Body | bytes]:
    yield chunk("One")
    yield {"error": {"message": "out of memory", "type": "server_error"}}
    yield b"data: [DONE]\n\n"


def without_usage(body: Body) -> Iterator[Body | bytes]:
    yield chunk("One", "stop")
    yield b"data: [DONE]\n\n"


def no_json(body: Body) -> Iterator[Body | bytes]:
    yield b"data: <html>\n\n"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ends_early, "broke a stream off"),
        (ends_with_an_error, "ends with out of memory"),
        (without_usage, "does not say how many tokens"),
        (no_json, "no JSON object: <html>"),
    ],
)
def test_a_stream_that_is_not_right_is_named(
    server: FakeServer, api: Api, answer: Answer, message: str
) -> None:
    server.answer = answer
    assert message in failing(api).args[0]
    server.answer = events
    assert api.ask({"max_tokens": 2}).num_tokens == 2  # the connection can be used again


def test_a_server_of_another_kind_is_named(server: FakeServer, api: Api) -> None:
    elsewhere = Api(f"{server.url}/elsewhere")
    with closing(elsewhere), pytest.raises(ServerError, match="does not list its models"):
        elsewhere.model(None)
    server.refusal = lambda body: (500, {"detail": "oh"})
    assert "refuses with 500" in failing(api).args[0]


def test_a_silent_server_is_given_up(server: FakeServer) -> None:
    let_go = threading.Event()

    def silent(body: Body) -> Iterator[Body | bytes]:
        let_go.wait(10)
        return events(body)

    server.answer = silent
    with closing(Api(server.url, 0.05)) as api:
        assert "silent for 0.05 seconds" in failing(api).args[0]
    let_go.set()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", "0"),
        ("concurrency", "1,x"),
        ("concurrency", ""),
        ("concurrency", "4096"),
        ("drafting", "sometimes"),
        ("drafting", "off,none"),
        ("requests", 2),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    config: LoadConfig, option: str, value: Any
) -> None:
    with pytest.raises(InvalidParameter, match=rf"^{option} is ") as error:
        dataclasses.replace(config, **{option: value})
    assert error.value.option == option


def test_results_are_not_overwritten(server: FakeServer, config: LoadConfig) -> None:
    config.out.write_text("mine\n")
    with pytest.raises(InvalidParameter, match="exists"):
        run_load(server.url, config)
    assert config.out.read_text() == "mine\n"
    assert server.bodies == []


def test_results_that_another_run_wrote_meanwhile_are_not_overwritten(
    server: FakeServer, config: LoadConfig
) -> None:
    def meanwhile(body: Body) -> Iterator[Body | bytes]:
        config.out.write_text("mine\n")
        yield from events(body)

    server.answer = meanwhile
    with pytest.raises(InvalidParameter, match="exists"):
        run_load(server.url, config)
    assert config.out.read_text() == "mine\n"
    assert len(server.bodies) == 3  # those that warm up


# --- the commands -------------------------------------------------------------------------------


def test_the_command_prints_a_table_that_report_and_plot_make_again(
    server: FakeServer, config: LoadConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "serve", server.url, "--prompts", str(config.prompts)]
    words += ["--out", str(config.out), "--concurrency", "1,2", "--repeats", "2"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert [name for name in LOAD_COLUMNS if name not in table] == []
    assert table.count("auto") == 2

    assert main(["report", str(config.out)]) == 0
    assert capsys.readouterr().out == table
    pictures = tmp_path / "plots"
    assert main(["plot", str(config.out), "--out", str(pictures)]) == 0
    names = {path.name for path in pictures.iterdir()}
    assert names >= {"report.md", "report.html"}
    for name in ("throughput", "first", "token", "ratio"):
        assert "<svg" in (pictures / f"load-{name}.svg").read_text()
    assert "| auto |" in (pictures / "report.md").read_text()


def test_another_file_is_no_load_test(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lacking = line()
    del lacking["num_tokens"]
    for other in ({"task": "chat"}, lacking):
        rows = [{"header": {"kind": "load"}}, other]
        path.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match="is no load test's results file"):
            read_load(path)
