"""A body becomes requests: what the engine is asked for, and what is refused before it waits."""

from __future__ import annotations

import json
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from conftest import VOCAB
from toy_folders import CHAT
from toy_prompts import language_model
from toy_tokenizers import byte_tokenizer

from flashdraft.decoding.grammar import Grammar, grammar_of
from flashdraft.engine import Request
from flashdraft.generate import Model
from flashdraft.serve.constraint import Constraint, constraint_of
from flashdraft.serve.errors import ApiError
from flashdraft.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from flashdraft.serve.translate import (
    Call,
    Settings,
    check_model,
    count_answers,
    detokenized,
    tokenized,
    translate,
)
from flashdraft.types import HIGHEST, SamplingParams

SAY = [{"role": "user", "content": "hi"}]
CONTEXT = 256  # tokens


@pytest.fixture(scope="module")
def model() -> Model:
    return language_model()


def body_of(kind: type[Body], fields: dict[str, Any]) -> Any:
    least = {"messages": SAY} if kind is ChatBody else {"prompt": "abc"}
    if kind is DetokenizeBody or "messages" in fields:
        least = {}
    return read_body(json.dumps(least | fields).encode(), kind)


def asked(model: Model, kind: type[Body] = CompletionBody, **fields: Any) -> Call:
    return translate(body_of(kind, fields), model, Settings(max_tokens=50), owner="me")


def params(model: Model, kind: type[Body] = CompletionBody, **fields: Any) -> SamplingParams:
    (request,) = asked(model, kind, **fields).requests
    return request.params


def refusal(model: Model, kind: type[Body] = CompletionBody, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asked(model, kind, **fields)
    return caught.value


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "toy", "alias"])
def test_the_served_names_are_known(name: str | None) -> None:
    check_model(name, ["toy", "alias"])


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Toy",
        "../../etc/passwd",
        "/etc/passwd",
        "org/repo",
        "https://example.org/m",
        "a" * 10**6,
    ],
)
def test_another_model_is_not_looked_for(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        check_model(name, ["toy", "alias"])
    error = caught.value
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 300
    assert "`toy`" in error.message
    assert time.perf_counter() - started < 0.1


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ChatBody, TokenizeBody])
def test_messages_are_told_by_the_template(model: Model, kind: type[Body]) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    expected = model.encode([{"role": "user", "content": "ab"}])
    body = body_of(kind, {"messages": turns})
    if isinstance(body, TokenizeBody):
        assert tokenized(body, model) == expected
    else:
        assert asked(model, kind, messages=turns).requests[0].prompt == expected


@pytest.mark.parametrize("kind", [CompletionBody, TokenizeBody])
def test_a_prompt_is_no_turn(model: Model, kind: type[Body]) -> None:
    expected = model.tokenizer.encode("abc", add_special_tokens=True)
    body = body_of(kind, {"prompt": "abc"})
    if isinstance(body, TokenizeBody):
        assert tokenized(body, model) == expected
    else:
        assert asked(model, kind, prompt="abc").requests[0].prompt == expected
    assert model.encode("abc") != expected  # which makes a turn of it


def test_thinking_is_the_templates_switch(model: Model) -> None:
    prompts = []
    for kwargs in (None, {}, {"enable_thinking": True}, {"enable_thinking": False}):
        call = asked(model, ChatBody, chat_template_kwargs=kwargs)
        prompts.append(call.requests[0].prompt)
    default, empty, on, off = prompts
    assert default == empty
    assert len({tuple(default), tuple(on), tuple(off)}) == 3


def test_a_switch_that_the_template_has_not_is_refused() -> None:
    error = refusal(language_model(CHAT), ChatBody, chat_template_kwargs={"enable_thinking": True})
    assert error.param == "chat_template_kwargs"


def test_a_model_without_a_template_has_no_chats() -> None:
    error = refusal(language_model(""), ChatBody)
    assert error.param == "messages"
    assert "/v1/completions" in error.message


def test_several_prompts_and_answers_stand_in_order(model: Model) -> None:
    call = asked(model, prompt=[[5, 6], [7]], n=2, seed=3)
    prompts = [request.prompt for request in call.requests]
    assert prompts == [[5, 6], [5, 6], [7], [7]]
    assert [request.index for request in call.requests] == [0, 1, 2, 3]
    assert [request.params.seed for request in call.requests] == [3, 4, 3, 4]
    assert {request.owner for request in call.requests} == {"me"}


def test_a_salt_parts_the_requests_of_one_key_and_joins_none_of_two(model: Model) -> None:
    (plain,) = asked(model).requests
    (salted,) = asked(model, cache_salt="me").requests
    (again,) = asked(model, cache_salt="me").requests
    (other,) = asked(model, cache_salt="you").requests
    assert salted.owner == again.owner
    owners = {plain.owner, salted.owner, other.owner}
    assert len(owners) == 3

    forged = translate(
        body_of(ChatBody, {"cache_salt": "me"}), model, Settings(max_tokens=50), owner=""
    )
    assert forged.requests[0].owner not in owners


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (CompletionBody, {"prompt": [VOCAB]}, "prompt"),
        (CompletionBody, {"prompt": [[5], [HIGHEST]]}, "prompt"),
        (CompletionBody, {"prompt": ""}, "prompt"),
        (CompletionBody, {"prompt": ["abc", ""]}, "prompt"),
        (CompletionBody, {"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        (CompletionBody, {"logit_bias": {"9" * 18: 1}}, "logit_bias"),
    ],
)
def test_what_the_model_cannot_read_is_named(
    model: Model, kind: type[Body], fields: dict[str, Any], param: str
) -> None:
    error = refusal(model, kind, **fields)
    assert error.status == 400
    assert error.param == param


def test_tokens_become_text_again(model: Model) -> None:
    body = body_of(
        DetokenizeBody, {"tokens": model.tokenizer.encode("abc", add_special_tokens=False)}
    )
    assert detokenized(body, model) == "abc"
    with pytest.raises(ApiError) as caught:
        detokenized(body_of(DetokenizeBody, {"tokens": [VOCAB]}), model)
    assert caught.value.param == "tokens"


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"n": 10**9}, "n"), ({"n": 17}, "n"), ({"prompt": ["a"] * 65}, "prompt")],
)
def test_more_answers_than_are_granted_are_refused_at_once(
    model: Model, fields: dict[str, Any], param: str
) -> None:
    body = body_of(CompletionBody, fields)
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        count_answers(body, Settings())
    assert time.perf_counter() - started < 0.05
    assert caught.value.param == param
    assert refusal(model, **fields).param == param


def test_the_answers_to_a_long_prompt_are_counted_without_a_copy_of_it() -> None:
    body = body_of(CompletionBody, {"prompt": [5] * 1_000_000})
    tracemalloc.start()
    try:
        assert count_answers(body, Settings()) == 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 100_000


def test_the_most_answers_are_granted(model: Model) -> None:
    body = body_of(CompletionBody, {"prompt": ["a"] * 64, "n": 16})
    assert count_answers(body, Settings()) == 1024
    assert len(asked(model, n=16).requests) == 16


@pytest.mark.parametrize(
    ("num_prompt", "given", "taken"),
    [(3, None, 50), (CONTEXT - 10, None, 10), (3, 7, 7), (CONTEXT - 7, 7, 7), (3, 0, 1)],
)
def test_an_answer_is_as_long_as_asked_or_as_there_is_room(
    model: Model, num_prompt: int, given: int | None, taken: int
) -> None:
    found = params(model, prompt=[5] * num_prompt, max_tokens=given, echo=True)
    assert found.max_new_tokens == taken


@pytest.mark.parametrize(
    ("num_prompt", "given", "told"),
    [
        (CONTEXT, None, "256 tokens and 1"),
        (CONTEXT + 5, None, "261 tokens and 1"),
        (CONTEXT - 6, 7, "250 tokens and 7"),
        (3, HIGHEST, f"3 tokens and {HIGHEST}"),
    ],
)
def test_a_text_beyond_the_context_is_told_in_numbers(
    model: Model, num_prompt: int, given: int | None, told: str
) -> None:
    error = refusal(model, prompt=[5] * num_prompt, max_tokens=given)
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert error.param == "prompt"
    assert told in error.message
    assert "holds 256" in error.message


def test_a_talk_beyond_the_context_is_one_too(model: Model) -> None:
    long = [{"role": "user", "content": "a " * 300}]
    error = refusal(model, ChatBody, messages=long)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length_are_obeyed(model: Model, name: str) -> None:
    assert params(model, ChatBody, **{name: 9}).max_new_tokens == 9


# --- parameters -----------------------------------------------------------------------------------


def test_every_field_of_sampling_is_handed_on(model: Model) -> None:
    found = params(
        model,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        stop=["x", "y"],
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"5": -100},
        max_tokens=9,
    )
    assert found == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=3,
        stop=("x", "y"),
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={5: -100},
        max_new_tokens=9,
    )


def test_defaults_are_openais(model: Model) -> None:
    found = params(model, seed=0)
    assert found == SamplingParams(temperature=1.0, max_new_tokens=50)


def test_minus_one_keeps_all_tokens(model: Model) -> None:
    assert params(model, top_k=-1).top_k == 0


def test_without_a_seed_texts_differ(model: Model) -> None:
    seeds = {params(model).seed for _ in range(5)}
    assert len(seeds) == 5


def test_the_last_seed_is_followed_by_the_first(model: Model) -> None:
    call = asked(model, n=2, seed=HIGHEST)
    assert [request.params.seed for request in call.requests] == [HIGHEST, 0]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (ChatBody, {}, (False, 0, False)),
        (ChatBody, {"logprobs": True}, (True, 0, False)),
        (ChatBody, {"logprobs": True, "top_logprobs": 5}, (True, 5, False)),
        (CompletionBody, {}, (False, 0, False)),
        (CompletionBody, {"echo": True}, (False, 0, False)),
        (CompletionBody, {"logprobs": 0}, (True, 0, False)),
        (CompletionBody, {"logprobs": 3, "echo": True}, (True, 3, True)),
    ],
)
def test_logprobs_are_asked_for(
    model: Model, kind: type[Body], fields: dict[str, Any], expected: tuple[bool, int, bool]
) -> None:
    found = params(model, kind, **fields)
    assert (found.logprobs, found.top_logprobs, found.prompt_logprobs) == expected


@pytest.mark.parametrize(("given", "taken"), [(None, "auto"), ("on", "on"), ("off", "off")])
def test_drafting_is_by_request(model: Model, given: str | None, taken: str) -> None:
    request: Request = asked(model, drafting=given).requests[0]
    assert request.drafting == taken


def test_the_prompt_is_echoed_as_it_came(model: Model) -> None:
    assert asked(model, prompt="abc").prompts == []
    assert asked(model, prompt=["abc", "d"], echo=True).prompts == ["abc", "d"]
    tokens = model.tokenizer.encode("abc", add_special_tokens=False)
    assert asked(model, prompt=tokens, echo=True).prompts == ["abc"]
    assert asked(model, prompt="abc", echo=True, max_tokens=0).is_scoring
    assert not asked(model, prompt="abc", echo=True, max_tokens=1).is_scoring


# --- constraints ----------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}
NAMED_SCHEMA = {"name": "a", "schema": SCHEMA}
WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strange"}}}
LARK = 'start: "a"'
F = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
G = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            ("json", {"type": "object"}, "response_format"),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA},
                }
            },
            ("json", SCHEMA, "response_format"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json", SCHEMA, "structured_outputs")),
        ({"structured_outputs": {"json": "{}"}}, ("json", "{}", "structured_outputs")),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+", "structured_outputs")),
        ({"structured_outputs": {"choice": ["a"]}}, ("choice", ["a"], "structured_outputs")),
        (
            {"structured_outputs": {"grammar": "start: A"}},
            ("grammar", "start: A", "structured_outputs"),
        ),
        ({"tools": [F, G], "tool_choice": "auto"}, None),
        ({"tools": [F, G], "tool_choice": "none"}, None),
    ],
)
def test_what_the_text_must_be(fields: dict[str, Any], expected: Any) -> None:
    found = constraint_of(body_of(ChatBody, fields))
    assert found == (None if expected is None else Constraint(*expected))


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["f", "g"]), ({"type": "function", "function": {"name": "g"}}, ["g"])],
)
def test_a_call_is_forced_by_a_schema(choice: Any, names: list[str]) -> None:
    constraint = constraint_of(body_of(ChatBody, {"tools": [F, G], "tool_choice": choice}))
    assert constraint is not None
    assert constraint.param == "tool_choice"
    assert isinstance(constraint.source, dict)
    forms = constraint.source["anyOf"]
    assert [form["properties"]["name"]["const"] for form in forms] == names


def test_references_inside_a_schema_move_with_it() -> None:
    constraint = constraint_of(body_of(ChatBody, {"tools": [G, F], "tool_choice": "required"}))
    assert constraint is not None
    assert isinstance(constraint.source, dict)
    arguments = constraint.source["anyOf"][1]["properties"]["arguments"]
    pointer = arguments["properties"]["a"]["$ref"]
    found: Any = constraint.source
    for part in pointer.removeprefix("#/").split("/"):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found is arguments["$defs"]["a"]
    assert grammar_of(byte_tokenizer(), constraint.kind, constraint.source)


def test_a_schema_with_an_id_keeps_its_references() -> None:
    parameters = {**SCHEMA, "$id": "https://example.org/f.json"}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    constraint = constraint_of(body_of(ChatBody, {"tools": [G, tool], "tool_choice": "required"}))
    assert constraint is not None
    assert grammar_of(byte_tokenizer(), constraint.kind, constraint.source)


def test_a_constraint_becomes_one_grammar_for_all_answers(model: Model) -> None:
    hooks = []
    model = replace(model, tokenizer=byte_tokenizer())
    call = asked(model, prompt=[5], structured_outputs={"regex": "[ab]+"}, n=3)
    for request in call.requests:
        hooks.append(request.params.logits_processor)
    assert isinstance(hooks[0], Grammar)
    assert hooks == [hooks[0]] * 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"response_format": WRONG_SCHEMA}, "response_format"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_told_in_one_line(
    model: Model, fields: dict[str, Any], param: str
) -> None:
    error = refusal(replace(model, tokenizer=byte_tokenizer()), **fields)
    assert (error.status, error.param) == (400, param)
    assert "fast" not in error.message  # which would be the tokenizer's fault
    assert "\n" not in error.message
    assert len(error.message) < 1000
