"""What the engine gave out, as a client reads it: whole or streamed it is the same answer, in the
shapes that OpenAI's client, lm-eval and vLLM's tools read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import tiny_drafter
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.types import Message, Scope
from toy_prompts import language_model

from flashdraft.engine import Engine
from flashdraft.generate import Model
from flashdraft.serve import responses
from flashdraft.serve.protocol import ChatBody, CompletionBody, read_body
from flashdraft.serve.replies import Head, Reply, new_head
from flashdraft.serve.tokens import TokenTexts
from flashdraft.serve.translate import Call, Settings, translate
from flashdraft.serve.usage import Speculation
from flashdraft.serve.worker import TooSlow
from flashdraft.types import Chunk, FinishReason, Piece, Result, Stats, TokenLogprob

HEAD = Head("chatcmpl-1", 1_700_000_000, "toy", "fp")
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
quick = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def model() -> Model:
    return language_model()


def chat(model: Model, **fields: Any) -> Call:
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12} | fields
    return translate(read_body(json.dumps(asked).encode(), ChatBody), model, Settings())


def completion(model: Model, **fields: Any) -> Call:
    asked = {"prompt": "abc", "max_tokens": 12} | fields
    return translate(read_body(json.dumps(asked).encode(), CompletionBody), model, Settings())


def reply_to(call: Call, model: Model) -> Reply:
    return Reply(call, HEAD, TokenTexts(model.tokenizer))


def chunks_of(call: Call, model: Model) -> list[Chunk]:
    """What the engine gives, with a drafter that guesses at random."""
    engine = Engine(model.target, tiny_drafter(model.target), max_rows=2)
    for request in call.requests:
        engine.submit(request)
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    return chunks


def told(text: str, *, reason: FinishReason | None = None, index: int = 0) -> Chunk:
    """A step that gave this text, one token a letter, by hand; with a reason it is the last."""
    tokens = tuple(range(5, 5 + len(text)))
    result = None
    if reason is not None:
        result = Result(text, tokens, reason, Stats(num_prompt_tokens=7, num_tokens=len(text)))
    pieces = tuple(Piece(letter, drafted=False, logprob=-1.0) for letter in text)
    return Chunk(index, pieces, tokens, result)


def streamed(reply: Reply, chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """The stream; JSON can write it."""
    made = [event for event in map(reply.take, chunks) if event is not None]
    if reply.call.body.wants_usage:
        made.append(reply.last())
    json.dumps(made, allow_nan=False)
    return made


def whole(reply: Reply, chunks: Sequence[Chunk]) -> dict[str, Any]:
    for chunk in chunks:
        reply.take(chunk)
    body = reply.whole()
    json.dumps(body, allow_nan=False)
    return body


# --- whole and streamed ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_chat_is_the_same_whole_and_streamed(model: Model, n: int) -> None:
    fields = {"n": n, "seed": 5, "logprobs": True, "ignore_eos": True}
    call = chat(model, **fields)
    body = whole(reply_to(call, model), chunks_of(call, model))
    parsed = ChatCompletion.model_validate(body)
    assert [choice.index for choice in parsed.choices] == list(range(n))
    assert [choice.finish_reason for choice in parsed.choices] == ["length"] * n

    call = chat(model, **fields, **STREAM)
    events = streamed(reply_to(call, model), chunks_of(call, model))
    parts = [ChatCompletionChunk.model_validate(event) for event in events]
    assert {part.id for part in parts} == {body["id"]}
    for choice in parsed.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert [one.delta.role for one in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + ["length"]
        logprobs = [part for one in own for part in one.logprobs.content]  # type: ignore[union-attr]
        assert logprobs == choice.logprobs.content  # type: ignore[union-attr]
        assert len(logprobs) == 12
    assert parts[-1].choices == []
    assert parts[-1].usage == parsed.usage
    assert events[-1].get("metrics") == body.get("metrics")


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_is_the_same_whole_and_streamed(model: Model, echo: bool) -> None:
    fields = {"prompt": ["abc", "d"], "n": 2, "seed": 5, "echo": echo, "ignore_eos": True}
    fields["logprobs"] = None if echo else 0
    call = completion(model, **fields)
    body = whole(reply_to(call, model), chunks_of(call, model))
    parsed = Completion.model_validate(body)
    assert [choice.index for choice in parsed.choices] == [0, 1, 2, 3]
    if echo:
        assert [choice.text[:3] for choice in parsed.choices[:2]] == ["abc", "abc"]
        assert [choice.text[0] for choice in parsed.choices[2:]] == ["d", "d"]

    call = completion(model, **fields, **STREAM)
    events = streamed(reply_to(call, model), chunks_of(call, model))
    sent = [event["choices"][0] for event in events[:-1]]
    for choice in parsed.choices:
        own = [one for one in sent if one["index"] == choice.index]
        assert "".join(one["text"] for one in own) == choice.text
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + ["length"]
        for name in () if echo else ("tokens", "token_logprobs", "text_offset"):
            parts = [part for one in own for part in one["logprobs"][name]]
            assert parts == getattr(choice.logprobs, name)
            assert len(parts) == 12
    assert events[-1]["usage"] == body["usage"]


def test_a_step_without_text_sends_nothing(model: Model) -> None:
    reply = reply_to(chat(model, stream=True), model)
    held = Chunk(0, (Piece("", drafted=False),), (5,))
    assert reply.take(held) is not None  # the role
    assert reply.take(held) is None
    assert reply.take(told("a")) is not None
    assert reply.take(told("", reason="stop")) is not None


@pytest.mark.parametrize("make", [chat, completion])
def test_usage_is_null_until_it_is_there(model: Model, make: Any) -> None:
    call = make(model, **STREAM)
    *events, last = streamed(reply_to(call, model), chunks_of(call, model))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(call.requests[0].prompt)

    call = make(model, stream=True)
    events = streamed(reply_to(call, model), chunks_of(call, model))
    assert not any("usage" in event for event in events)


def test_usage_may_come_with_every_chunk(model: Model) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    call = chat(model, n=2, stream=True, stream_options=options, ignore_eos=True)
    *events, last = streamed(reply_to(call, model), chunks_of(call, model))
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == last["usage"]["completion_tokens"] == 24
    for event in events:
        usage = event["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_ids_cannot_be_guessed(model: Model) -> None:
    ids = {new_head(call, "toy").id for call in [chat(model), completion(model)] * 3}
    assert len(ids) == 6
    assert sorted({one.split("-")[0] for one in ids}) == ["chatcmpl", "cmpl"]


# --- what a message is made of --------------------------------------------------------------------

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]
TOOLED = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %} </think>"
)


@pytest.mark.parametrize(
    ("text", "reason", "message", "expected"),
    [
        ("hi", "stop", {"content": "hi"}, "stop"),
        ("", "stop", {"content": ""}, "stop"),
        ("<think>a</think>hi", "stop", {"content": "hi", "reasoning_content": "a"}, "stop"),
        ("<think>a", "length", {"content": None, "reasoning_content": "a"}, "length"),
        (CALL, "stop", {"content": None}, "tool_calls"),
        (f"hi{CALL}{CALL}", "stop", {"content": "hi"}, "tool_calls"),
        (CALL, "length", {"content": None}, "length"),
        ("hi <tool_c", "length", {"content": "hi <tool_c"}, "length"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_reasoning_and_calls_are_told_apart(
    text: str, reason: FinishReason, message: dict[str, Any], expected: str, size: int
) -> None:
    model = language_model(TOOLED)
    chunks = [told(text[i : i + size]) for i in range(0, len(text), size)]
    chunks.append(told("", reason=reason))
    (choice,) = whole(reply_to(chat(model, tools=TOOLS), model), chunks)["choices"]
    calls = choice["message"].pop("tool_calls", [])
    assert choice["message"] == {"role": "assistant", **message}
    assert choice["finish_reason"] == expected
    assert len(calls) == text.count(CALL)
    assert all(call["function"] == {"name": "f", "arguments": '{"a": 1}'} for call in calls)

    events = streamed(reply_to(chat(model, tools=TOOLS, stream=True), model), chunks)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == (message["content"] or "")
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert thought == message.get("reasoning_content", "")
    sent = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in sent] == list(range(len(calls)))
    assert events[-1]["choices"][0]["finish_reason"] == expected


def test_a_text_that_was_ended_says_so(model: Model) -> None:
    (choice,) = whole(reply_to(chat(model), model), [told("a", reason="length")])["choices"]
    assert choice["finish_reason"] == "length"


# --- log-probabilities ----------------------------------------------------------------------------


def scored(
    model: Model,
    text: str,
    new: str,
    top: Sequence[tuple[str, float]],
    reason: FinishReason = "length",
) -> Chunk:
    """The last chunk of a completion behind `text`, with log-probabilities of all tokens."""
    tokenizer = model.tokenizer
    prompt = tokenizer.encode(text, add_special_tokens=False)
    tokens = tokenizer.encode(new, add_special_tokens=False)
    likeliest = tuple((tokenizer.convert_tokens_to_ids(one), value) for one, value in top)
    pieces = tuple(Piece(letter, drafted=False, logprob=-2.0, top=likeliest) for letter in new)
    of_prompt = (None, *(TokenLogprob(token, -3.0, likeliest) for token in prompt[1:]))
    stats = Stats(num_prompt_tokens=len(prompt), num_tokens=len(tokens))
    result = Result(new, tuple(tokens), reason, stats, prompt_logprobs=of_prompt)
    return Chunk(0, pieces, tuple(tokens), result)


def lm_eval(choice: dict[str, Any], num_context: int) -> tuple[float, bool]:
    """The log-likelihood of what follows the context, and whether it is greedy, as lm-eval's
    `local-completions` takes it out of an echoed prompt and one new token.
    """
    found = choice["logprobs"]["token_logprobs"][num_context:-1]
    tops = choice["logprobs"]["top_logprobs"][num_context:-1]
    is_greedy = all(own == max(top.values()) for own, top in zip(found, tops, strict=True))
    return sum(found), is_greedy


@pytest.mark.parametrize(("best", "is_greedy"), [(-3.0, True), (-2.5, False)])
def test_lm_eval_reads_the_likelihood_of_an_echoed_prompt(
    model: Model, best: float, is_greedy: bool
) -> None:
    call = completion(model, prompt="abcd", max_tokens=1, echo=True, logprobs=1)
    chunk = scored(model, "abcd", "e", [("z", best)])
    (choice,) = whole(reply_to(call, model), [chunk])["choices"]
    assert choice["text"] == "abcde"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -3.0, -3.0, -2.0]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"z": best, "b": -3.0}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert lm_eval(choice, 2) == (-6.0, is_greedy)


def test_a_prompt_may_be_scored_alone(model: Model) -> None:
    call = completion(model, prompt="abcd", max_tokens=0, echo=True, logprobs=0)
    body = whole(reply_to(call, model), [scored(model, "abcd", "e", [], "stop")])
    (choice,) = body["choices"]
    assert choice["text"] == "abcd"
    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -3.0, -3.0]
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["finish_reason"] == "length"  # whatever the token was that is not shown
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["total_tokens"] == 4


def test_a_prompt_whose_scoring_was_ended_says_so(model: Model) -> None:
    call = completion(model, prompt="abcd", max_tokens=0, echo=True, logprobs=0)
    (choice,) = whole(reply_to(call, model), [told("", reason="abort")])["choices"]
    assert choice["finish_reason"] == "abort"


def test_the_engine_scores_a_prompt(model: Model) -> None:
    call = completion(model, prompt="abcd", max_tokens=1, echo=True, logprobs=1, temperature=0)
    (choice,) = whole(reply_to(call, model), chunks_of(call, model))["choices"]
    assert choice["logprobs"]["tokens"][:4] == ["a", "b", "c", "d"]
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert all(value < 0 for value in rest)
    assert choice["logprobs"]["top_logprobs"][-1] == {choice["text"][4:]: rest[-1]}


def test_a_chats_logprobs_have_bytes_and_rivals(model: Model) -> None:
    call = chat(model, logprobs=True, top_logprobs=2)
    chunk = scored(model, "x", "e", [("e", -0.5), ("z", float("-inf"))])
    body = whole(reply_to(call, model), [chunk])
    (one,) = body["choices"][0]["logprobs"]["content"]
    assert one == {
        "token": "e",
        "logprob": -2.0,
        "bytes": [101],
        "top_logprobs": [
            {"token": "e", "logprob": -0.5, "bytes": [101]},
            {"token": "z", "logprob": -9999.0, "bytes": [122]},
        ],
    }
    ChatCompletion.model_validate(body)


def test_without_logprobs_there_are_none(model: Model) -> None:
    for call in (chat(model), completion(model)):
        body = whole(reply_to(call, model), [told("a", reason="stop")])
        assert body["choices"][0]["logprobs"] is None


# --- sums -----------------------------------------------------------------------------------------


def finished(index: int, **counts: int) -> Chunk:
    stats = Stats(num_prompt_tokens=10, num_cached=4, **counts)
    return Chunk(index, (), (), Result("", (), "stop", stats))


def test_a_prompt_counts_once_and_every_answer_counts(model: Model) -> None:
    call = completion(model, prompt=["a", "b"], n=3)
    chunks = [finished(i, num_tokens=5, num_drafted=7, num_accepted=3) for i in range(6)]
    body = whole(reply_to(call, model), chunks)
    assert body["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 30,
        "total_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 18,
            "rejected_prediction_tokens": 24,
        },
    }


def test_usage_of_an_answer_that_goes_on_is_not_counted(model: Model) -> None:
    reply = reply_to(completion(model, n=2), model)
    reply.take(told("abc"))
    assert reply.usage.num_new == 0
    reply.take(finished(0, num_tokens=3))
    assert reply.usage.num_new == 3


steps = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=20)


@given(steps)
@quick
def test_what_drafting_did_adds_up(made: list[tuple[int, int, bool]]) -> None:
    """In vLLM's own terms: a step accepts at most what was drafted, and its bonus token counts."""
    speculation = Speculation()
    for num_accepted, num_rejected, has_bonus in made:
        pieces = (Piece("", True),) * num_accepted + (Piece("", False),) * has_bonus
        speculation.add(Chunk(0, pieces, (5,) * len(pieces), rejected=(5,) * num_rejected))

    drafted = [(accepted, accepted + rejected) for accepted, rejected, _ in made]
    drafted = [step for step in drafted if step[1]]
    body = speculation.body()
    histogram = body["acceptance_histogram"]
    assert body["num_spec_steps"] == sum(histogram) == len(drafted)
    assert body["num_draft_tokens"] == sum(of for _, of in drafted)
    assert body["num_accepted_draft_tokens"] == sum(accepted for accepted, _ in drafted)
    assert sum(i * count for i, count in enumerate(histogram)) == body["num_accepted_draft_tokens"]
    assert len(histogram) == body["num_spec_tokens"] + 1
    assert 1 <= body["mean_acceptance_length"] <= body["num_spec_tokens"] + 1
    assert 0 <= body["draft_acceptance_rate"] <= 1


def test_what_drafting_did_is_told_where_there_was_any(model: Model) -> None:
    reply = reply_to(chat(model), model)
    reply.take(told("a"))
    reply.take(Chunk(0, (Piece("b", True), Piece("c", False)), (6, 7), rejected=(8, 9)))
    reply.take(told("", reason="stop"))
    assert reply.whole()["metrics"]["speculative_decoding"] == {
        "num_spec_steps": 1,
        "num_spec_tokens": 3,
        "num_draft_tokens": 3,
        "num_accepted_draft_tokens": 1,
        "mean_acceptance_length": 2.0,
        "draft_acceptance_rate": 1 / 3,
        "acceptance_histogram": [0, 1, 0, 0],
    }
    assert "metrics" not in whole(reply_to(chat(model), model), [told("a", reason="stop")])


def test_a_stream_shows_what_was_drafted(model: Model) -> None:
    reply = reply_to(chat(model, stream=True, draft_pieces=True), model)
    rejected = model.tokenizer.encode("xy", add_special_tokens=False)
    chunk = Chunk(0, (Piece("b", True), Piece("", False)), (6, 7), rejected=tuple(rejected))
    event = reply.take(chunk)
    assert event is not None
    assert event["flashdraft"] == {
        "index": 0,
        "pieces": [{"text": "b", "origin": "drafted"}, {"text": "", "origin": "target"}],
        "rejected": ["x", "y"],
        "num_drafted": 3,
    }
    quiet = reply.take(Chunk(0, (Piece("", False),), (7,)))
    assert quiet is not None
    assert quiet["choices"] == []


class StalledStream:
    """A worker's stream with one chunk, whose client reads nothing."""

    def __init__(self, chunk: Chunk) -> None:
        self.overflowed = asyncio.Event()
        self.is_closed = False
        self._chunks = [chunk]

    async def news(self, seconds: float) -> bool:
        return True

    async def __anext__(self) -> Chunk:
        if not self._chunks:
            raise StopAsyncIteration
        return self._chunks.pop()

    def close(self) -> None:
        self.is_closed = True


def test_a_client_that_leaves_its_stream_unread_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "_PATIENCE", 0.05)
    call = chat(model, stream=True)
    stream: Any = StalledStream(chunks_of(call, model)[0])
    dropped: list[bool] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # the connection's buffer is full

    async def run() -> Scope:
        reply = reply_to(call, model)
        answer = responses.EventStream(stream, reply, lambda: None, keep_alive=1.0)
        scope: Scope = {"type": "http", "state": {"abort": lambda: dropped.append(True)}}
        async with asyncio.timeout(10):
            await answer(scope, receive, send)
        return scope

    scope = asyncio.run(run())
    assert dropped == [True]
    assert stream.is_closed
    assert scope["state"]["status"] == responses._STATUSES[TooSlow][0]
