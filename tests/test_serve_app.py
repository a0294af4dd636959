"""The routes over real sockets: what is answered, what is refused, and in which shape."""

from __future__ import annotations

import hmac
import json
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from toy_server import (
    NAME,
    Toy,
    answer_from,
    chat_body,
    connected,
    events_of,
    posted,
    raw,
    running,
    said,
)

from flashdraft.serve import app as app_module
from flashdraft.serve.app import OPEN, Options
from flashdraft.serve.limits import MAX_HEADER_BYTES

CHAT = "/v1/chat/completions"
KEYS = (b"first-key", b"second-key")
WITH_KEY = {"authorization": "Bearer second-key"}
LIMIT = 4 * 2**20
PATHS = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{NAME}"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
Json = dict[str, Any]


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    with running(options=Options(NAME, max_body_bytes=LIMIT)) as made:
        yield made


@pytest.fixture(scope="module")
def locked() -> Iterator[Toy]:
    origins = ("https://example.org",)
    with running(options=Options(NAME, keys=KEYS, cors_origins=origins)) as made:
        yield made


@pytest.fixture
def client(toy: Toy) -> Iterator[httpx.Client]:
    with toy.client() as made:
        yield made


def error_of(answer: httpx.Response) -> Json:
    """The error in OpenAI's shape, all four fields of it."""
    error: Json = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


def is_alive(client: httpx.Client) -> bool:
    return client.get("/health").status_code == 200


# --- texts ----------------------------------------------------------------------------------------


def test_a_chat_is_answered_with_the_models_own_text(toy: Toy, client: httpx.Client) -> None:
    answer = client.post(CHAT, json=chat_body("hello")).json()
    model = toy.worker.model
    assert model is not None
    turns = [{"role": "user", "content": "hello"}]
    own = model.generate([turns], max_new_tokens=12, ignore_eos=True)[0]
    assert answer["choices"][0]["message"]["content"] == own.text
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["model"] == NAME


def test_greedy_text_is_one_text_drafted_or_not_streamed_or_not_alone_or_not(toy: Toy) -> None:
    prompts = ("hello", "abc", "a longer one, it is", "x")
    alone = [said(toy, chat_body(prompt)) for prompt in prompts]
    assert len(set(alone)) == 4
    for drafting in ("off", "on", "auto"):
        for stream in (False, True):
            bodies = [chat_body(one, drafting=drafting, stream=stream) for one in prompts]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lambda body: said(toy, body), bodies))
            assert together == alone
            assert said(toy, bodies[2]) == alone[2]


def test_a_seed_gives_the_same_text_twice_and_another_one_another(toy: Toy) -> None:
    texts = []
    for seed in (5, 5, 6):
        texts.append(said(toy, chat_body(temperature=1.0, seed=seed)))
    assert texts[0] == texts[1] != texts[2]


def test_tokens_go_there_and_back(client: httpx.Client) -> None:
    told = client.post("/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    back = client.post("/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": "abc"}


def test_the_model_is_listed_and_found_by_its_name(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == NAME
    assert card["max_model_len"] == 256
    assert client.get(f"/v1/models/{NAME}").json() == card


def test_the_page_is_there(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


# --- bodies that are wrong ------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "half": b'{"messages": [',
    "a list": b"[1]",
    "a text": b'"hello"',
    "bad UTF-8": b'{"messages": "\xff\xfe"}',
    "deep": b"[" * 200_000,
    "deep field": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "half a character": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_what_is_no_body_is_a_400_and_the_server_goes_on(path: str, client: httpx.Client) -> None:
    as_json = {"content-type": "application/json"}
    for content in BROKEN.values():
        answer = client.post(path, content=content, headers=as_json)
        assert answer.status_code == 400
        error_of(answer)
    assert is_alive(client)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_does_not_say_it_is_json_is_a_415(
    kind: str | None, client: httpx.Client
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post(CHAT, content=json.dumps(chat_body()).encode(), headers=headers)
    assert answer.status_code == 415
    error_of(answer)
    named = {"content-type": "Application/JSON; charset=utf-8"}
    again = client.post(CHAT, content=json.dumps(chat_body()).encode(), headers=named)
    assert again.status_code == 200


def test_every_value_of_a_sampling_field_is_taken_or_refused_by_name(client: httpx.Client) -> None:
    fields = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "max_tokens", "stop")
    fields += ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    fields += ("logprobs", "top_logprobs", "stream", "ignore_eos", "max_completion_tokens")
    values = ("NaN", "Infinity", "-Infinity", "-1", "0", '"5"', "true", str(2**63), "1e400", "{}")
    base = json.dumps(chat_body(max_tokens=1))[1:]
    as_json = {"content-type": "application/json"}
    statuses = set()
    for field in fields:
        for value in values:
            own = base.replace('"max_tokens": 1, ', "") if "tokens" in field else base
            content = f'{{"{field}": {value}, {own}'.replace('"temperature": 0, ', "")
            if field == "ignore_eos":
                content = content.replace(', "ignore_eos": true', "")
            answer = client.post(CHAT, content=content.encode(), headers=as_json)
            statuses.add(answer.status_code)
            if answer.status_code != 200:
                assert answer.status_code == 400, content
                param = error_of(answer)["param"]
                assert param is not None, content
                assert param.split(".")[0].split("[")[0] in (field, "logprobs"), content
    assert statuses == {200, 400}


def test_a_prompt_beyond_the_context_is_told_both_numbers(client: httpx.Client) -> None:
    for prompt, new, told in (("a" * 300, 8, "300"), ("a" * 200, 100, "200")):
        body = {"model": NAME, "prompt": prompt, "max_tokens": new}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        error = error_of(answer)
        assert error["code"] == "context_length_exceeded"
        assert told in error["message"]
        assert "256" in error["message"]


@pytest.mark.alone
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_no_cache_can_hold_is_named_where_it_came_in(
    stream: bool, toy: Toy, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.knobs.engines[-1].scheduler, "longest", 5)
    for path, body, param in (
        (CHAT, chat_body(), "messages"),
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 9}, "prompt"),
    ):
        answer = client.post(path, json={**body, "stream": stream})
        assert answer.status_code == 400
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_a_billion_answers_are_refused_at_once(client: httpx.Client) -> None:
    took = []
    for _ in range(5):
        started = time.monotonic()
        answer = client.post(CHAT, json=chat_body(n=10**9))
        took.append(time.monotonic() - started)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "n"
    assert min(took) < 0.05


_opened: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "socket.connect"):
        _opened.append(f"{event} {arguments}")


@pytest.mark.parametrize(
    "name",
    ["gpt-4", "../../etc/passwd", "/etc/passwd", "org/repo", "https://example.org/model", ""],
)
def test_a_model_that_is_not_served_is_a_404_and_nothing_is_looked_for(name: str, toy: Toy) -> None:
    global _opened
    sys.addaudithook(_watch)
    answers = []
    for body in (chat_body(model=name), chat_body(model=name, stream=True)):
        with connected(toy) as sock:
            _opened = []
            sock.sendall(posted(body))
            answers.append(answer_from(sock))
            opened = _opened
            _opened = None
            assert opened == []
    for answer in answers:
        assert answer.status == 404
        assert b"model_not_found" in answer.body


# --- routes that are not there --------------------------------------------------------------------


def test_errors_of_every_kind_have_the_same_shape(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/health", 405),
        ("GET", "/health/", 404),
        ("GET", "/v1/models/other", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        error_of(answer)
        if status == 405:
            assert answer.headers["allow"]


def test_every_request_has_an_id(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flashdraft")
    made = client.get("/health").headers["x-request-id"]
    assert len(made) == 32
    kept = client.post(CHAT, json=chat_body("secret"), headers={"x-request-id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, "<script>", '{"a": 1}'):
        got = client.get("/nothing", headers={"x-request-id": bad}).headers["x-request-id"]
        assert got != bad
        assert len(got) == 32

    facts = [vars(record)["facts"] for record in caplog.records if hasattr(record, "facts")]
    own = next(fact for fact in facts if fact["request_id"] == "mine-1")
    assert own["route"] == CHAT
    assert own["status"] == 200
    assert own["completion_tokens"] == 12
    assert "secret" not in caplog.text + str(facts)


# --- sizes ----------------------------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_unread(toy: Toy) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {LIMIT + 1}\r\n\r\n"
    answer = raw(toy, head.encode())
    assert answer.status == 413
    assert b"body_too_large" in answer.body


def test_a_body_without_a_length_is_refused_when_it_grows_too_large(toy: Toy) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    part = b"10000\r\n" + b" " * 65536 + b"\r\n"
    tracemalloc.start()
    try:
        with connected(toy) as sock:
            before = tracemalloc.get_traced_memory()[0]
            sock.sendall(head.encode())
            for _ in range(4 * LIMIT // 65536):
                sock.sendall(part)
            answer = answer_from(sock)
            growth = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert answer.status == 413
    assert growth < 2 * LIMIT


def test_a_body_at_the_limit_is_read(client: httpx.Client) -> None:
    content = json.dumps(chat_body()).encode()
    content += b" " * (LIMIT - len(content))
    as_json = {"content-type": "application/json"}
    assert client.post(CHAT, content=content, headers=as_json).status_code == 200
    assert client.post(CHAT, content=content + b" ", headers=as_json).status_code == 413


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES, 3 * MAX_HEADER_BYTES, 2**20])
def test_headers_that_are_too_large_are_refused(size: int, toy: Toy, client: httpx.Client) -> None:
    with connected(toy) as sock:
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * size + b"\r\n\r\n")
            answer = answer_from(sock)
        except ConnectionError:  # it was closed while we still sent
            answer = None
    if answer is not None:
        assert answer.status == 431
        assert b"headers_too_large" in answer.body
    assert answer is not None or size == 2**20
    assert is_alive(client)


def test_what_is_no_http_is_refused_in_the_same_shape(toy: Toy) -> None:
    answer = raw(toy, b"hello\r\n\r\n")
    assert answer.status == 400
    assert b'"code": "invalid_http"' in answer.body


# --- keys -----------------------------------------------------------------------------------------


def test_every_route_needs_a_key_but_the_page_and_two_checks(locked: Toy) -> None:
    with locked.client() as client:
        for method, path in PATHS:
            refused = client.request(method, path)
            assert refused.status_code == 401
            assert error_of(refused)["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert client.request(method, path, headers=WITH_KEY).status_code != 401
        for path in OPEN:
            assert client.get(path).status_code == 200
        answer = client.post(CHAT, json=chat_body(), headers=WITH_KEY)
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-keyy",
        "Basic first-key",
        "first-key",
        "Bearer first-key second-key",
        "Bearer FIRST-KEY",
    ],
)
def test_a_wrong_key_is_no_key(header: str, locked: Toy) -> None:
    with locked.client() as client:
        assert client.get("/v1/models", headers={"authorization": header}).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1/../v1/models",
        "/v1/%2e%2e/v1/models",
        "/%2e%2e/v1/models",
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/health%2f..%2fv1/models",
        "/health/v1/models",
        "/healthv1",
        "/health;/v1/models",
        "http://x/health/../v1/models",
    ],
)
@pytest.mark.parametrize("host", ["a", "a/?", "a/health", "/health", "a/health?x="])
def test_no_path_and_no_host_leads_around_the_keys(target: str, host: str, locked: Toy) -> None:
    answer = raw(locked, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.status == 401
    plain = raw(locked, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert plain.status == 401


def test_two_authorization_headers_are_none(locked: Toy) -> None:
    both = "Authorization: Bearer first-key\r\nAuthorization: Bearer x\r\n"
    answer = raw(locked, f"GET /v1/models HTTP/1.1\r\nHost: a\r\n{both}\r\n".encode())
    assert answer.status == 401


def test_keys_are_compared_whole_as_bytes_and_all_of_them(
    locked: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[Any, Any]] = []
    compare = hmac.compare_digest

    def seen(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", seen)
    with locked.client() as client:
        for key, status in (("first-key", 200), ("second-key", 200), ("wrong", 401)):
            compared.clear()
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status
            assert len(compared) == len(KEYS)
            assert {len(part) for pair in compared for part in pair} == {32}


def test_keys_and_prompts_are_in_no_log_and_no_figure(
    locked: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with locked.client(headers=WITH_KEY) as client:
        client.post(CHAT, json=chat_body("hush"))
        client.post(CHAT, json=chat_body("hush", seed="hush"))
        client.get("/hush", headers={"authorization": "Bearer wrong-key"})
        figures = client.get("/metrics").text
    logged = " ".join(str(vars(record)) for record in caplog.records if "httpx" not in record.name)
    for secret in ("first-key", "second-key", "wrong-key", "hush"):
        assert secret not in figures
        if secret != "hush":
            assert secret not in logged
    assert "'content'" not in logged


def test_the_rows_of_a_key_carry_its_digest(locked: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = []
    translate = app_module.translate

    def seen(*arguments: Any, owner: str, **options: Any) -> Any:
        owners.append(owner)
        return translate(*arguments, owner=owner, **options)

    monkeypatch.setattr(app_module, "translate", seen)
    with locked.client() as client:
        for key in ("first-key", "second-key", "first-key"):
            client.post(CHAT, json=chat_body(), headers={"authorization": f"Bearer {key}"})
    assert owners[0] == owners[2] != owners[1]
    assert len(owners[0]) == 64
    assert "key" not in owners[0]


# --- origins --------------------------------------------------------------------------------------


def test_no_origin_is_allowed_unless_it_is_named(toy: Toy, locked: Toy) -> None:
    asks = {"origin": "https://example.org", "access-control-request-method": "POST"}
    with toy.client() as client:
        for answer in (client.get("/health", headers=asks), client.options(CHAT, headers=asks)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    with locked.client() as client:
        allowed = client.options(CHAT, headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        other = client.options(CHAT, headers={**asks, "origin": "https://elsewhere.org"})
        assert "access-control-allow-origin" not in other.headers


# --- figures --------------------------------------------------------------------------------------


def test_the_counters_are_the_sums_of_usage(toy: Toy) -> None:
    names = ("prompt_tokens_total", "completion_tokens_total", "cached_tokens_total")
    before = {name: toy.metric(name) for name in names}
    requests = toy.metric("requests_total", route=CHAT, status="200")
    usages = []
    with toy.client() as client:
        for body in (chat_body("a"), chat_body("bc", n=3), chat_body("d", max_tokens=1)):
            usages.append(client.post(CHAT, json=body).json()["usage"])
        body = chat_body("efg", n=2, stream=True, stream_options={"include_usage": True})
        with client.stream("POST", CHAT, json=body) as stream:
            *_, last, done = events_of(stream.iter_lines())
        assert done == "[DONE]"
        usages.append(last["usage"])
        figures = client.get("/metrics").text

    for name in names[:2]:
        field = name.removesuffix("_total")
        assert toy.metric(name) - before[name] == sum(usage[field] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert toy.metric(names[2]) - before[names[2]] == cached
    assert toy.metric("requests_total", route=CHAT, status="200") - requests == 4
    assert toy.metric("accepted_tokens_total") <= toy.metric("drafted_tokens_total")
    assert toy.metric("drafted_tokens_total") > 0
    assert toy.metric("running_requests") == toy.metric("waiting_requests") == 0
    assert "flashdraft_time_to_first_token_seconds_count" in figures


def test_a_count_that_is_not_the_usage_is_seen(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubles(usage: Any) -> None:
        toy.worker.metrics.prompt_tokens.inc(2 * usage.num_prompt)

    monkeypatch.setattr(toy.worker.metrics, "count", doubles)
    with pytest.raises(AssertionError):
        test_the_counters_are_the_sums_of_usage(toy)


def test_every_status_is_documented_and_every_body_described(client: httpx.Client) -> None:
    made = client.get("/openapi.json").json()
    assert set(made["paths"]) == {
        CHAT,
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
    }
    schemas = made["components"]["schemas"]
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            statuses = set(operation["responses"])
            assert {"200", "400", "401", "413", "431", "500"} <= statuses
            assert "422" not in statuses
            if method == "post":
                content = operation["requestBody"]["content"]["application/json"]
                name = content["schema"]["$ref"].rpartition("/")[2]
                assert schemas[name]["additionalProperties"] is False
                assert {"404", "415", "503"} <= statuses
            if path in (CHAT, "/v1/completions"):
                assert {"429", "504"} <= statuses
    references = set()
    _collect_references(made, references)
    assert {reference.rpartition("/")[2] for reference in references} <= set(schemas)


def _collect_references(value: Any, found: set[str]) -> None:
    if isinstance(value, dict):
        if "$ref" in value:
            found.add(value["$ref"])
        for part in value.values():
            _collect_references(part, found)
    if isinstance(value, list):
        for part in value:
            _collect_references(part, found)
