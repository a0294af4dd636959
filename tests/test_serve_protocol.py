"""What a client may send: every field once taken and once refused by name; whatever the bytes are,
the answer is a body or status 400 in OpenAI's shape.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import chat as openai_chat
from openai.types import completion_create_params as openai_completion

from flashdraft.serve.errors import ApiError
from flashdraft.serve.fields import Fixed
from flashdraft.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)

SAY = {"role": "user", "content": "hi"}
CHAT = {"messages": [SAY]}
TEXT = {"prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
KINDS: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatBody, CHAT),
    (CompletionBody, TEXT),
    (TokenizeBody, TEXT),
    (DetokenizeBody, {"tokens": [1]}),
]
quick = settings(derandomize=True, deadline=None, max_examples=200)


def read(kind: type[Body], fields: object) -> Any:
    return read_body(json.dumps(fields).encode(), kind)


def refused(kind: type[Body], fields: object) -> dict[str, Any]:
    """The error in the body that the client gets."""
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(ApiError) as caught:
        read_body(raw, kind)
    return checked(caught.value)


def checked(error: ApiError) -> dict[str, Any]:
    """The error, which any JSON writer can write."""
    assert error.status == 400
    body = error.body()
    json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
    assert set(body) == {"error"}
    told = body["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["type"] == "invalid_request_error"
    assert told["message"]
    assert len(told["message"]) < 1000
    assert "\n" not in told["message"]
    return dict(told)


# --- bytes ----------------------------------------------------------------------------------------

BAD_BYTES = {
    "empty": b"",
    "blank": b" \n",
    "no JSON": b"{",
    "a comma too many": b'{"prompt": "a",}',
    "single quotes": b"{'prompt': 'a'}",
    "two values": b'{"prompt": "a"} {}',
    "a list": b"[]",
    "null": b"null",
    "text": b'"prompt"',
    "a number": b"5",
    "NaN": b"NaN",
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "200k lists": b"[" * 200_000,
    "200k closed lists": b"[" * 200_000 + b"]" * 200_000,
    "200k objects": b'{"a":' * 200_000,
    "200k lists in a field": b'{"prompt": ' + b"[" * 200_000,
    "5000 digits": b"1" * 5000,
    "a name twice": b'{"prompt": "a", "prompt": "b"}',
    "half a character in a name": b'{"\\ud800": 1}',
    "NUL": b'{"prompt": "a"}\0',
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_no_body_are_one_line(name: str) -> None:
    told = refused(CompletionBody, BAD_BYTES[name])
    assert told["code"] == "invalid_json"
    assert told["param"] is None


MEMBERS = b",".join(b'"%d":1' % i for i in range(5000))


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b'{"prompt": "a", "temperature": ' + b"1" * 5000 + b"}", "finite"),
        (b'{"prompt": "a", "temperature": -' + b"1" * 50 + b"}", "finite"),
        (b'{"prompt": "a", "temperature": 1e999}', "finite"),
        (b'{"prompt": "a", "temperature": NaN}', "finite"),
        (b'{"prompt": "a", "temperature": [[-Infinity]]}', "finite"),
        (b'{"prompt": "a", "temperature": "\\udfff"}', "half a character"),
        (b'{"prompt": "a", "temperature": {"\\udfff": 1}}', "half a character"),
        (b'{"prompt": "a", "temperature": ' + b"[" * 65 + b"]" * 65 + b"}", "too deep"),
        (
            b'{"prompt": "a", "temperature": {'
            + b",".join(b'"%d":1' % i for i in range(5000))
            + b"}}",
            "4096",
        ),
    ],
)
def test_what_no_field_can_hold_is_named(raw: bytes, what: str) -> None:
    told = refused(CompletionBody, raw)
    assert told["param"] == "temperature"
    assert what in told["message"]


def test_an_error_repeats_the_beginning_of_a_long_name() -> None:
    for value in (b"1", b"NaN", b'"\\ud800"'):
        told = refused(CompletionBody, b'{"' + b"a" * 100_000 + b'": ' + value + b"}")
        assert told["param"] == "a" * 200


def test_a_schema_may_be_as_deep_as_allowed() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(25):
        schema = {"type": "object", "properties": {"a": schema}}
    body = read(ChatBody, {**CHAT, "structured_outputs": {"json": schema}})
    assert body.structured_outputs.json_ == schema


@given(st.binary(max_size=60))
@quick
def test_any_bytes_are_a_body_or_an_error(raw: bytes) -> None:
    for kind, _ in KINDS:
        try:
            read_body(raw, kind)
        except ApiError as error:
            checked(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data())
@quick
def test_any_values_are_a_body_or_an_error_that_names_a_field(data: st.DataObject) -> None:
    kind, least = data.draw(st.sampled_from(KINDS))
    names = sorted({*kind.model_fields, *kind.refused, "foo"})
    fields = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    try:
        read_body(json.dumps(least | fields).encode(), kind)
    except ApiError as error:
        param = checked(error)["param"]
        assert any(param == name or param.startswith((f"{name}.", f"{name}[")) for name in fields)


# --- numbers --------------------------------------------------------------------------------------

# what each field takes of NUMBERS; all else must be refused
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, "5", True, False, 2**63, 10**30, 1.5, [], {})
TAKEN: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1.5),
    "top_p": (),
    "top_k": (-1, 0),
    "min_p": (0,),
    "presence_penalty": (-1, 0, 1.5),
    "frequency_penalty": (-1, 0, 1.5),
    "repetition_penalty": (1.5,),
    "seed": (0,),
    "n": (),
    "max_tokens": (),
    "logprobs": (0,),
    "best_of": (),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_wild_numbers_are_taken_as_they_are_or_refused_by_name(name: str, value: Any) -> None:
    fields = {**TEXT, name: value}
    is_taken = any(value == one and type(value) is type(one) for one in TAKEN[name])
    if is_taken:
        assert getattr(read(CompletionBody, fields), name) == value
    else:
        assert refused(CompletionBody, fields)["param"] == name


@pytest.mark.parametrize("name", ["top_logprobs", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [value for value in NUMBERS if value != 0], ids=repr)
def test_wild_numbers_of_chats_are_refused_by_name(name: str, value: Any) -> None:
    fields = {**CHAT, "logprobs": True, name: value}
    assert refused(ChatBody, fields)["param"] == name


def test_a_billion_answers_are_looked_at_in_no_time() -> None:
    started = time.perf_counter()
    body = read(CompletionBody, {**TEXT, "n": 10**9})
    assert body.num_answers == 10**9
    assert time.perf_counter() - started < 0.05


# --- fields ---------------------------------------------------------------------------------------

# kind, field, one value that it takes, one that it refuses, and where the fault is if not there
FIELDS: list[tuple[type[Body], str, Any, Any, str]] = [
    (ChatBody, "model", "toy", 5, ""),
    (ChatBody, "stream", True, "true", ""),
    (ChatBody, "stream_options", None, {"include_usage": True}, ""),  # without stream
    (ChatBody, "n", 3, 0, ""),
    (ChatBody, "seed", 7, -7, ""),
    (ChatBody, "stop", "a", "", ""),
    (ChatBody, "stop", ["a", "b"], ["a", ""], "stop[1]"),
    (ChatBody, "stop", ["a"] * 16, ["a"] * 17, ""),
    (ChatBody, "stop", "a" * 1000, "a" * 1001, ""),
    (ChatBody, "temperature", 2, 2.1, ""),
    (ChatBody, "top_p", 1, 0, ""),
    (ChatBody, "top_k", 40, 1.0, ""),
    (ChatBody, "min_p", 0.1, 1, ""),
    (ChatBody, "presence_penalty", -2, -2.1, ""),
    (ChatBody, "frequency_penalty", 2, 2.1, ""),
    (ChatBody, "repetition_penalty", 1.1, 0, ""),
    (ChatBody, "logit_bias", {"5": -100}, {"5": 101}, "logit_bias.5"),
    (ChatBody, "logit_bias", {}, {"five": 1}, ""),
    (ChatBody, "logit_bias", None, {"05": 1}, ""),
    (ChatBody, "logit_bias", None, {"-5": 1}, ""),
    (ChatBody, "logit_bias", None, {"5": "1"}, "logit_bias.5"),
    (ChatBody, "ignore_eos", True, 1, ""),
    (ChatBody, "response_format", {"type": "text"}, {}, "response_format.type"),
    (ChatBody, "response_format", {"type": "json_object"}, {"type": "xml"}, "response_format.type"),
    (
        ChatBody,
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        "response_format.json_schema.schema",
    ),
    (ChatBody, "structured_outputs", {"regex": "a+"}, {"regex": "a", "choice": ["a"]}, ""),
    (
        ChatBody,
        "structured_outputs",
        {"choice": ["a"]},
        {"choice": []},
        "structured_outputs.choice",
    ),
    (ChatBody, "structured_outputs", {"grammar": "start: A"}, {}, ""),
    (ChatBody, "structured_outputs", {"json": "{}"}, {"json": 5}, "structured_outputs.json"),
    (ChatBody, "structured_outputs", {"json": {}}, {"js": {}}, "structured_outputs.js"),
    (ChatBody, "drafting", "off", "sometimes", ""),
    (ChatBody, "draft_pieces", False, True, ""),  # without stream
    (ChatBody, "cache_salt", "a" * 200, "a" * 201, ""),
    (ChatBody, "cache_salt", "a", "", ""),
    (ChatBody, "user", "me", 5, ""),
    (ChatBody, "messages", [SAY], [], ""),
    (ChatBody, "max_tokens", 5, 0, ""),
    (ChatBody, "max_completion_tokens", 5, 0, ""),
    (ChatBody, "logprobs", True, 5, ""),
    (ChatBody, "top_logprobs", None, 5, ""),  # without logprobs
    (ChatBody, "tools", [TOOL], [TOOL, TOOL], ""),
    (ChatBody, "tools", [], [{"type": "web_search"}], "tools[0].type"),
    (ChatBody, "tools", [TOOL] * 0, [TOOL] * 129, ""),
    (
        ChatBody,
        "tools",
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"type": "function", "function": {"name": "f", "strict": True}}],
        "tools[0].function.strict",
    ),
    (ChatBody, "tool_choice", "none", "auto", ""),  # without tools
    (ChatBody, "parallel_tool_calls", True, "no", ""),
    (
        ChatBody,
        "chat_template_kwargs",
        {"enable_thinking": False},
        {"tokenize": True},
        "chat_template_kwargs.tokenize",
    ),
    (ChatBody, "metadata", {"a": "b"}, {"a": 5}, "metadata.a"),
    (ChatBody, "safety_identifier", "a", 5, ""),
    (ChatBody, "prompt_cache_key", "a", 5, ""),
    (CompletionBody, "prompt", "", None, ""),
    (CompletionBody, "prompt", ["a", "b"], [], ""),
    (CompletionBody, "prompt", [5, 6], [5, -6], ""),
    (CompletionBody, "prompt", [[5], [6]], [[5], []], ""),
    (CompletionBody, "prompt", ["a"], ["a", 5.0], ""),
    (CompletionBody, "prompt", [0], [True], ""),
    (CompletionBody, "prompt", ["a", [5]], [[[5]]], ""),
    (CompletionBody, "prompt", [2**63 - 1], [2**63], ""),
    (CompletionBody, "max_tokens", 5, 0, ""),  # without echo
    (CompletionBody, "best_of", 1, 2, ""),
    (CompletionBody, "echo", True, "yes", ""),
    (CompletionBody, "logprobs", 20, 21, ""),
    (CompletionBody, "add_special_tokens", False, 0, ""),
    (TokenizeBody, "prompt", "a", ["a"], ""),
    (TokenizeBody, "messages", None, [SAY], "prompt"),  # beside a prompt
    (TokenizeBody, "tools", [], [TOOL], ""),  # without messages
    (TokenizeBody, "chat_template_kwargs", None, {}, ""),  # without messages
    (TokenizeBody, "add_special_tokens", True, 1, ""),
    (TokenizeBody, "return_token_strs", True, 1, ""),
    (DetokenizeBody, "tokens", [0, 5], ["a"], "tokens[0]"),
    (DetokenizeBody, "tokens", [], [-1], "tokens[0]"),
    (DetokenizeBody, "model", "toy", True, ""),
]


@pytest.mark.parametrize(("kind", "name", "good", "bad", "place"), FIELDS)
def test_a_field_is_taken_or_refused_by_name(
    kind: type[Body], name: str, good: Any, bad: Any, place: str
) -> None:
    least = dict(KINDS)[kind]
    read(kind, {**least, name: good})
    assert refused(kind, {**least, name: bad})["param"] == (place or name)


def test_no_field_is_left_out_of_the_table() -> None:
    tested = {(kind, name) for kind, name, *_ in FIELDS}
    shared = set(ChatBody.model_fields) & set(CompletionBody.model_fields)
    tested |= {(CompletionBody, name) for name in shared}
    tested |= {(TokenizeBody, "model")}
    for kind, _ in KINDS:
        assert {(kind, name) for name in kind.model_fields} <= tested


FIXED = [(kind, name, fixed) for kind, _ in KINDS for name, fixed in kind.refused.items()]


@pytest.mark.parametrize(("kind", "name", "fixed"), FIXED)
def test_a_field_that_is_not_there_is_taken_where_it_asks_for_nothing(
    kind: type[Body], name: str, fixed: Fixed
) -> None:
    assert name not in kind.model_fields
    least = dict(KINDS)[kind]
    for harmless in (None, *fixed.values):
        read(kind, {**least, name: harmless})

    for asked in ("x", 7, {"x": 1}, ["x"]):
        told = refused(kind, {**least, name: asked})
        assert told["param"] == name
        assert told["code"] == "unsupported_parameter"
        assert fixed.hint is None or fixed.hint in told["message"]


@pytest.mark.parametrize(
    ("name", "value"), [("store", 0), ("priority", False), ("min_tokens", False)]
)
def test_zero_is_not_false(name: str, value: object) -> None:
    assert refused(ChatBody, {**CHAT, name: value})["param"] == name


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
@pytest.mark.parametrize(("kind", "least"), KINDS[:2])
def test_removed_names_say_what_to_use(kind: type[Body], least: Any, name: str) -> None:
    assert "use structured_outputs" in refused(kind, {**least, name: "a"})["message"]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (ChatBody, openai_chat.completion_create_params.CompletionCreateParamsStreaming),
        (ChatBody, openai_chat.completion_create_params.CompletionCreateParamsNonStreaming),
        (CompletionBody, openai_completion.CompletionCreateParamsStreaming),
        (CompletionBody, openai_completion.CompletionCreateParamsNonStreaming),
    ],
)
def test_every_field_that_openai_documents_is_known(kind: type[Body], params: Any) -> None:
    documented = params.__required_keys__ | params.__optional_keys__
    assert len(documented) > 15
    assert documented <= kind.model_fields.keys() | kind.refused.keys()


@pytest.mark.parametrize(("kind", "least"), KINDS)
def test_an_unknown_field_is_refused(kind: type[Body], least: Any) -> None:
    told = refused(kind, {**least, "temprature": 1})
    assert told["param"] == "temprature"
    assert told["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ChatBody, "messages"), (CompletionBody, "prompt"), (DetokenizeBody, "tokens")],
)
def test_what_is_missing_is_named(kind: type[Body], name: str) -> None:
    told = refused(kind, {})
    assert told["param"] == name
    assert told["code"] == "missing_required_parameter"


# --- messages -------------------------------------------------------------------------------------

CALLED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "a", "type": "text"},  # as lm-eval sends it
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "assistant", "content": "", "reasoning_content": "a"},
        {"role": "tool", "content": "a", "tool_call_id": "call_1", "name": "f"},
        # as the client gives an answer back
        openai_chat.ChatCompletionMessage(role="assistant", content="a").model_dump(),
        openai_chat.ChatCompletionMessage(role="assistant", content="a", annotations=[]).to_dict(),
    ],
    ids=repr,
)
def test_messages_of_every_role_are_taken(message: dict[str, Any]) -> None:
    body = read(ChatBody, {"messages": [SAY, message]})
    assert body.messages[1].role == message["role"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[1]"),
        ({}, "messages[1].role"),
        ({"role": "robot", "content": "a"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [IMAGE]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": "a", "name": "me"}, "messages[1].name"),
        ({"role": "user", "content": "a", "tool_calls": [CALLED]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "a", "refusal": "b"}, "messages[1].refusal"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "tool", "content": "a"}, "messages[1].tool_call_id"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(message: Any, param: str) -> None:
    assert refused(ChatBody, {"messages": [SAY, message]})["param"] == param


def test_an_error_repeats_nothing_of_a_talk() -> None:
    secret = "a secret"
    for message in (
        {"role": "user", "content": [{"type": "text", "text": secret, "x": secret}]},
        {"role": "user", "content": secret, "name": secret},
        {"role": "tool", "content": secret, "name": [secret]},
        secret,
    ):
        assert secret not in refused(ChatBody, {"messages": [message]})["message"]
    assert secret not in refused(CompletionBody, {"prompt": [secret, 5]})["message"]
    assert secret in refused(ChatBody, {**CHAT, "temperature": secret})["message"]


# --- together -------------------------------------------------------------------------------------

STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
NAMED = {"type": "function", "function": {"name": "f"}}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    "fields",
    [
        STREAM,
        {"stream": True, "draft_pieces": True},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"logprobs": True, "top_logprobs": 20},
        {"tools": [TOOL], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": NAMED, "response_format": {"type": "text"}},
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}},
        {"parallel_tool_calls": False},
        {"tools": [STRICT], "tool_choice": "required", "parallel_tool_calls": False},
        {"logprobs": False, "top_logprobs": 0},
    ],
)
def test_fields_that_go_together(fields: dict[str, Any]) -> None:
    read(ChatBody, {**CHAT, **fields})


def test_special_tokens_are_asked_for_where_one_prompt_is_text() -> None:
    body = read(CompletionBody, {"prompt": [[5], "a"], "add_special_tokens": False})
    assert body.prompt == [[5], "a"]


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (ChatBody, {"stream": False, "stream_options": {}}, "stream_options"),
        (ChatBody, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (ChatBody, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        (ChatBody, {"tools": [], "tool_choice": "required"}, "tool_choice"),
        (ChatBody, {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            ChatBody,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (
            ChatBody,
            {"tools": [TOOL], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "tool_choice",
        ),
        (
            ChatBody,
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        (CompletionBody, {"n": 2, "best_of": 3}, "best_of"),
        (CompletionBody, {"max_tokens": 0}, "max_tokens"),
        (CompletionBody, {"stream": True, "echo": True, "logprobs": 1}, "stream"),
        (CompletionBody, {"messages": [SAY]}, "messages"),
        (CompletionBody, {"prompt": [5], "add_special_tokens": True}, "add_special_tokens"),
        (TokenizeBody, {"messages": [SAY]}, "prompt"),
        (TokenizeBody, {"prompt": None}, "prompt"),
        (
            TokenizeBody,
            {"prompt": None, "messages": [SAY], "add_special_tokens": True},
            "add_special_tokens",
        ),
    ],
)
def test_fields_that_exclude_each_other(
    kind: type[Body], fields: dict[str, Any], param: str
) -> None:
    assert refused(kind, {**dict(KINDS)[kind], **fields})["param"] == param


# --- /openapi.json --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "least"), KINDS)
def test_the_schema_names_every_field_and_no_other(kind: type[Body], least: Any) -> None:
    schema = kind.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == kind.model_fields.keys() | kind.refused.keys()
    json.dumps(schema, allow_nan=False)
    for name, fixed in kind.refused.items():
        assert schema["properties"][name]["enum"] == [None, *fixed.values]
