"""Grammars: what they allow, where they end, what is refused, and texts with every drafter."""

from __future__ import annotations

import functools
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LetterTokenizer
from torch import Tensor
from toy_engine import METHODS, run
from toy_grammars import END, PADDED, START, TURN_END, byte_target, byte_tokenizer

from flashdraft.decoding import grammar as module
from flashdraft.decoding.grammar import Grammar, grammar_of
from flashdraft.decoding.text import TextDecoder
from flashdraft.engine import Engine, Request
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.generate import Model
from flashdraft.loading import Loaded, drafters, load_target
from flashdraft.methods.autoregressive import Autoregressive
from flashdraft.types import Result, SamplingParams, Steering

ENDS = frozenset({END, TURN_END})
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
        "kind": {"enum": ["true", "trust", "no"]},
        "note": {"type": "string", "maxLength": 5},
    },
    "required": ["age", "ok", "kind", "note"],
    "additionalProperties": False,
}


def schema_grammar() -> Grammar:
    return Grammar.json_schema(byte_tokenizer(), SCHEMA)


GRAMMARS: dict[str, Callable[[], Grammar]] = {
    "schema": schema_grammar,
    "spaced": lambda: Grammar.json_schema(byte_tokenizer(), SCHEMA, any_spacing=True),
    "object": lambda: Grammar.json_object(byte_tokenizer()),
    "regex": lambda: Grammar.regex(byte_tokenizer(), r"(yes|no|maybe)( [0-9]{2,4}a*)?"),
    "choice": lambda: Grammar.choice(byte_tokenizer(), ["page", "pages", "true"]),
    "lark": lambda: Grammar.lark(byte_tokenizer(), 'start: "a" start? "b" | "age"'),
}


def allowed(state: Steering, size: int = PADDED) -> list[int]:
    masked = state.masked(torch.zeros(size))
    return masked.isfinite().nonzero()[:, 0].tolist()


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


def behind(grammar: Grammar, text: str, ends: frozenset[int] = ENDS) -> Steering:
    state = grammar.begin(ends)
    for token in tokens_of(text):
        state = state.then(token)
    return state


def walked(state: Steering, luck: random.Random, most: int = 60) -> list[int]:
    """The tokens of a random text, its end included if it comes."""
    tokens: list[int] = []
    while len(tokens) < most and not ENDS & set(tokens):
        token = luck.choice(allowed(state))
        tokens.append(token)
        state = state.then(token)
    return tokens


def text_of(tokens: Sequence[int]) -> str:
    kept = [token for token in tokens if token not in ENDS]
    return byte_tokenizer().decode(kept, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_state_is_a_function_of_its_tokens(name: str) -> None:
    """It is the same for one that is copied step by step and for one that reads all at once,
    whatever was asked of the states before it, and whatever became of its siblings.
    """
    grammar = GRAMMARS[name]()
    for seed in range(4):
        luck = random.Random(seed)
        tokens = walked(grammar.begin(ENDS), luck, most=25)
        asked = grammar.begin(ENDS)
        for count, token in enumerate(tokens):
            untouched = grammar.begin(ENDS)
            for earlier in tokens[:count]:
                untouched = untouched.then(earlier)
            sibling = luck.choice(allowed(asked))
            asked.then(sibling).forced()
            assert list(asked.forced()) == list(untouched.forced())
            assert allowed(asked) == allowed(untouched)
            asked = asked.then(token)


@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_the_only_ones_that_are_allowed(name: str) -> None:
    num_forced = 0
    for seed in range(4):
        state = GRAMMARS[name]().begin(frozenset({END}))
        for token in walked(state, random.Random(seed), most=30):
            ahead = state
            for forced in state.forced():
                assert allowed(ahead) == [forced]
                assert ahead.allows(forced)
                ahead = ahead.then(forced)
                num_forced += 1
            state = state.then(token if token != TURN_END else END)
    assert num_forced > 0


@pytest.mark.parametrize("name", GRAMMARS)
def test_what_is_allowed_is_not_denied(name: str) -> None:
    state = GRAMMARS[name]().begin(ENDS)
    for token in walked(state, random.Random(1), most=12):
        denied = [one for one in allowed(state) if not state.allows(one)]
        assert denied == []
        state = state.then(token)


def test_the_ends_are_allowed_exactly_where_the_text_may_end() -> None:
    grammar = Grammar.regex(byte_tokenizer(), "xy?")
    (x,) = tokens_of("x")
    (y,) = tokens_of("y")
    assert allowed(grammar.begin(ENDS)) == [x]
    assert allowed(behind(grammar, "x")) == [END, TURN_END, y]
    assert allowed(behind(grammar, "xy")) == [END, TURN_END]
    assert not grammar.begin(ENDS).allows(END)
    assert behind(grammar, "x").allows(TURN_END)
    assert behind(grammar, "xy").forced() == ()  # which of the two is the model's choice
    assert behind(grammar, "xy", frozenset({END})).forced() == (END,)
    assert allowed(behind(grammar, "xy").then(END)) == [END, TURN_END]


def test_an_end_that_is_a_word_ends_the_text_and_stands_nowhere_else() -> None:
    (x,) = tokens_of("x")
    grammar = Grammar.regex(byte_tokenizer(), "a[x-z]*")
    state = behind(grammar, "a", frozenset({x}))
    assert x in allowed(state)
    inside = behind(Grammar.regex(byte_tokenizer(), "a[x-z]"), "a", frozenset({x}))
    assert allowed(inside) == tokens_of("yz")


def test_a_model_without_an_end_is_told_so() -> None:
    state = behind(Grammar.regex(byte_tokenizer(), "x"), "x", frozenset())
    assert state.forced() == ()
    with pytest.raises(InvalidParameter, match="after 1 tokens of text: no token is allowed"):
        allowed(state)


@pytest.mark.parametrize("size", [PADDED, 400, 262])
def test_ids_that_the_tokenizer_lacks_are_forbidden(size: int) -> None:
    grammar = Grammar.regex(byte_tokenizer(), "(?s:.*)")
    assert allowed(grammar.begin(ENDS), size)[-1] <= len(byte_tokenizer())
    assert START not in allowed(grammar.begin(ENDS), size)


# ---------------------------------------------------------------- kinds


def is_record(text: str) -> bool:
    record = json.loads(text)
    assert list(record) == SCHEMA["required"]
    assert 0 <= record["age"] <= 99
    assert isinstance(record["ok"], bool)
    assert record["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert len(record["note"]) <= 5
    return text == json.dumps(record, ensure_ascii=False)


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_keep_to_a_schema(seed: int) -> None:
    tokens = walked(schema_grammar().begin(ENDS), random.Random(seed), most=200)
    text = text_of(tokens)
    record = json.loads(text)
    assert list(record) == SCHEMA["required"]
    assert record["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert len(record["note"]) <= 5
    head, _, _ = text.partition('"note"')
    assert re.fullmatch(r'\{"age": \d+, "ok": (true|false), "kind": "\w+", ', head)


HARD = ['say "hi"', "a\\b", "two\nlines", "é", "😀", "page"]


@pytest.mark.parametrize("text", HARD)
def test_a_choice_is_taken_letter_by_letter(text: str) -> None:
    state = behind(Grammar.choice(byte_tokenizer(), HARD), text)
    assert allowed(state) == [END, TURN_END]


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (lambda t: Grammar.regex(t, r"[0-9]{2}-[a-c]+"), "42-abc", "4-a"),
        (lambda t: Grammar.lark(t, 'start: "a" start? "b"'), "aabb", "ba"),
        (lambda t: Grammar.lark(t, 'root ::= "yes" | "no" [0-9]'), "no7", "maybe"),
        (lambda t: Grammar.json_schema(t, '{"type": "integer"}'), "-12", "x"),
        (lambda t: Grammar.json_schema(t, {}), "[1, null]", "]"),
        (lambda t: Grammar.json_object(t), '{"a": {"b": []}}', "[1]"),
        (lambda t: Grammar.json_object(t), "{}", "{ }"),
        (lambda t: Grammar.json_schema(t, SCHEMA, any_spacing=True), '{ "age"', '{"no"'),
        (lambda t: grammar_of(t, "json", {"type": "boolean"}), "true", "yes"),
        (lambda t: grammar_of(t, "regex", "a|b"), "b", "c"),
        (lambda t: grammar_of(t, "choice", ("page", "pages")), "pages", "pagers"),
        (lambda t: grammar_of(t, "grammar", 'start: "a"+'), "aaa", "ab"),
    ],
)
def test_every_kind_takes_what_fits_and_nothing_else(
    make: Callable[[Any], Grammar], right: str, wrong: str
) -> None:
    def is_taken(text: str) -> bool:
        state = make(byte_tokenizer()).begin(ENDS)
        for token in tokens_of(text):
            if token not in allowed(state):
                return False
            state = state.then(token)
        return True

    assert is_taken(right)
    assert not is_taken(wrong)


def test_equal_grammars_are_compiled_once() -> None:
    first = schema_grammar()
    assert schema_grammar()._start is first._start
    other = Grammar.json_schema(byte_tokenizer(), SCHEMA, any_spacing=True)
    assert other._start is not first._start


def test_threads_may_ask_one_grammar_at_once() -> None:
    grammar = schema_grammar()
    first = grammar.begin(ENDS)
    second = grammar.begin(ENDS)
    assert isinstance(first, module._Matched)
    assert isinstance(second, module._Matched)
    # The library raises where a matcher that one thread asks is asked by another.
    assert first._matcher is not second._matcher
    assert first._matcher is not grammar._start


# ---------------------------------------------------------------- what is refused

DEEP: Any = {"type": "string"}
for _ in range(3000):
    DEEP = {"type": "array", "items": DEEP}
PROPERTIES = {f"p{i}": {"type": "string"} for i in range(6000)}

REFUSED: dict[str, tuple[str, Any, str]] = {
    "a type that is none": ("json", {"type": "strin"}, "Invalid type: strin"),
    "a keyword that is not kept": ("json", {"not": {"type": "string"}}, "not"),
    "nothing fits": ("json", {"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisf"),
    "a file": ("json", {"$ref": "file:///etc/passwd"}, "not fetch"),
    "an address": ("json", {"$ref": "http://127.0.0.1:9/x"}, "not fetch"),
    "a list": ("json", "[1]", "a JSON schema is an object"),
    "no spacing": ("json", {"x-guidance": {"blanks": 1}}, "blanks"),
    "no JSON": ("json", "{", "no JSON"),
    "no JSON value": ("json", {"const": {1, 2}}, "no JSON"),
    "too deep": ("json", DEEP, "no JSON"),
    "too many fields": ("json", {"properties": PROPERTIES, "type": "object"}, "20000 are allowed"),
    "too many bytes": ("json", {"description": "x" * 300_000}, "bytes; 262144 are allowed"),
    "many optional fields": (
        "json",
        {"type": "object", "properties": dict(list(PROPERTIES.items())[:1500])},
        "items; max is 2000",
    ),
    "a large choice": ("choice", [f"number {i} of many" for i in range(9999)], "too many"),
    "a large enum": ("json", {"enum": [f"number {i} of many" for i in range(9999)]}, "too big"),
    "half a character": ("json", {"const": "\ud800"}, "half a character"),
    "an open group": ("regex", "(abc", "unclosed group"),
    "look-ahead": ("regex", "(?=a)b", "look-around"),
    "a deep expression": ("regex", "(" * 2000 + "a" + ")" * 2000, "nest"),
    "an empty choice": ("choice", [""], "none of them is empty"),
    "no choice": ("choice", [], "none of them is empty"),
    "one text": ("choice", "abc", "not made from str"),
    "an unknown rule": ("grammar", "start: foo", "unknown name"),
    "no grammar": ("grammar", "hello world", "Expected"),
    "a deep grammar": ("grammar", "start: " + "(" * 999 + '"a"' + ")" * 999, "deeply nested"),
    "an unknown kind": ("xml", "a", "kind 'xml'"),
    "nothing": ("regex", None, "not made from NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_in_one_line(name: str) -> None:
    kind, source, part = REFUSED[name]
    with pytest.raises(InvalidParameter, match=re.escape(part)) as raised:
        grammar_of(byte_tokenizer(), kind, source)  # type: ignore[arg-type]
    message = raised.value.args[0]
    assert "\n" not in message
    assert len(message) < 400
    assert raised.value.hint


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "((a|b){0,999}x){0,999}", "(.*a.{20}){9}"])
def test_an_expression_that_explodes_takes_no_time(pattern: str) -> None:
    """Refused at once, or when it has grown; each token takes milliseconds."""
    started = time.perf_counter()
    with suppress(InvalidParameter):
        state = Grammar.regex(byte_tokenizer(), pattern).begin(ENDS)
        for _ in range(20):
            state = state.then(allowed(state)[0])
    assert time.perf_counter() - started < 2


def test_a_grammar_that_grows_too_large_while_it_is_used_says_so() -> None:
    texts = " | ".join(f'"number {i} of many"' for i in range(5000))
    lark = f'start: NUMBER "x" many\nNUMBER: /[0-9]+/\nmany: {texts}'
    grammar = Grammar.lark(byte_tokenizer(), lark)
    assert tokens_of("x")[0] in allowed(behind(grammar, "1234567"))
    state = behind(grammar, "1234567xn")
    with pytest.raises(InvalidParameter, match="the grammar cannot go on after 9 tokens") as raised:
        allowed(state)
    assert "\n" not in raised.value.args[0]
    assert state.forced() == ()


def test_a_state_behind_a_forbidden_token_says_so() -> None:
    state = schema_grammar().begin(ENDS).then(tokens_of("x")[0])
    assert not state.allows(tokens_of("y")[0])
    with pytest.raises(InvalidParameter, match="cannot go on after 1 tokens of text"):
        allowed(state)


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="this tokenizer cannot be read for grammars"):
        Grammar.json_object(LetterTokenizer())  # type: ignore[arg-type]


def test_a_server_may_read_any_tokenizer_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong shows with the first grammar."""
    module.prepare(byte_tokenizer())
    module.prepare(LetterTokenizer())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "llguidance", None)
    module.prepare(byte_tokenizer())


def test_a_missing_extra_is_one_line_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(FlashDraftError, match="needs llguidance") as raised:
        grammar_of(byte_tokenizer(), "json", {"type": "object"})
    assert raised.value.hint == "pip install 'flashdraft[serve]'"


# ---------------------------------------------------------------- texts

PROMPTS = ((5, 9, 7), (9, 8, 30, 4, 11, 7, 8, 40, 22, 13), tuple(range(10, 31)))


def params_of(temperature: float) -> list[SamplingParams]:
    common = SamplingParams(temperature=temperature, seed=4, max_new_tokens=70)
    with_schema = replace(common, logits_processor=schema_grammar())
    with_choice = replace(common, logits_processor=GRAMMARS["regex"](), top_k=30, seed=7)
    return [with_schema, replace(common, max_new_tokens=20), with_choice]


def requests_of(params: Sequence[SamplingParams]) -> list[Request]:
    requests = []
    for index, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True)):
        decoder = TextDecoder(byte_tokenizer(), own.stop)
        requests.append(Request(list(prompt), own, decoder, ENDS, index))
    return requests


def without_memory(grammar: Grammar, num_prompt: int) -> Callable[[Sequence[int], Tensor], Tensor]:
    """A grammar as a function of all tokens: it reads the text anew at every node."""

    def hook(tokens: Sequence[int], logits: Tensor) -> Tensor:
        state = grammar.begin(ENDS)
        for token in tokens[num_prompt:]:
            state = state.then(token)
        return state.masked(logits)

    return hook


@functools.cache
def plain(temperature: float) -> list[Result]:
    params = params_of(temperature)
    own = []
    for prompt, one in zip(PROMPTS, params, strict=True):
        hook = one.logits_processor
        if isinstance(hook, Grammar):
            one = replace(one, logits_processor=without_memory(hook, len(prompt)))
        own.append(one)
    return run(Engine(byte_target(), Autoregressive(), max_rows=1), requests_of(own))


def check_texts(method: str, temperature: float) -> list[Result]:
    params = params_of(temperature)
    wanted = plain(temperature)
    futures = [prompt + one.tokens for prompt, one in zip(PROMPTS, wanted, strict=True)]
    drafter = METHODS[method](byte_target(), futures, 4)
    results = run(Engine(byte_target(), drafter, max_rows=3), requests_of(params))
    assert [one.tokens for one in results] == [one.tokens for one in wanted]
    assert [one.text for one in results] == [one.text for one in wanted]
    assert results[0].finish_reason == results[2].finish_reason == "stop"
    assert is_record(results[0].text)
    assert re.fullmatch(r"(yes|no|maybe)( [0-9]{2,4}a*)?", results[2].text)
    return results


@pytest.mark.parametrize("method", [method for method in METHODS if method != "drawn"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_the_plain_text(method: str, temperature: float) -> None:
    check_texts(method, temperature)


def test_forced_tokens_save_passes_where_nothing_else_drafts() -> None:
    record = check_texts("autoregressive", 0.0)[0]
    assert record.stats.target_passes < len(record.tokens) / 2
    assert record.stats.num_accepted == record.stats.num_drafted > 0


# ---------------------------------------------------------------- planted faults


def not_copied(self: module._Matched, token: int) -> Steering:
    if token in self._ends:
        return module._Ended(self._ends)
    self._matcher.consume_token(token)
    return module._Matched(self._matcher, self._reader, self._ends)


def read_twice(self: module._Matched, token: int) -> Steering:
    once = right(self, token)
    return once if isinstance(once, module._Ended) else right(once, token)  # type: ignore[arg-type]


def of_the_parent(self: module._Matched, token: int) -> Steering:
    return self


right = module._Matched._made


@pytest.mark.parametrize("fault", [not_copied, read_twice, of_the_parent])
def test_a_state_of_another_node_is_seen(
    fault: Callable[..., Steering], monkeypatch: pytest.MonkeyPatch
) -> None:
    for temperature in (0.0, 0.9):
        plain(temperature)  # by the right states
    monkeypatch.setattr(module._Matched, "_made", fault)
    with pytest.raises((AssertionError, InvalidParameter)):
        check_texts("tree", 0.9)


# ---------------------------------------------------------------- the real model

PEOPLE = (
    "Anna Berg is 34, teaches in Oslo, and is married.",
    "Tom Hill, a pilot of 51 from Leeds, lives alone.",
    "Marie Blanc bakes bread in Lyon. She is 28, and single.",
)
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 20},
        "profession": {"enum": ["teacher", "pilot", "baker", "doctor"]},
        "is_married": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "profession", "is_married"],
    "additionalProperties": False,
}


@functools.cache
def real_model() -> Loaded:
    return load_target("smollm2-135m")


@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_records_of_the_real_model_are_valid_and_those_of_plain_decoding(
    temperature: float,
) -> None:
    target, tokenizer, eos = real_model()
    hook = Grammar.json_schema(tokenizer, RECORD)
    params = SamplingParams(temperature=temperature, max_new_tokens=90, logits_processor=hook)
    results = {}
    for draft in ("autoregressive", "dflash"):
        new_drafter = drafters(draft, target, "smollm2-135m")
        model = Model(target, tokenizer, new_drafter, eos=eos, max_rows=3)
        results[draft] = model.generate([f"Write a JSON record: {one}" for one in PEOPLE], params)

    plain_tokens = [one.tokens for one in results["autoregressive"]]
    assert [one.tokens for one in results["dflash"]] == plain_tokens
    for one in results["autoregressive"]:
        record = json.loads(one.text)
        assert one.text == json.dumps(record, ensure_ascii=False)
        assert list(record) == RECORD["required"]
        assert record["profession"] in ["teacher", "pilot", "baker", "doctor"]
        assert one.stats.target_passes < 0.7 * len(one.tokens)
