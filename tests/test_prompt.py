"""What is a prompt and what is none, in every type that people hand over; and that no template
drops a turn in silence.
"""

from __future__ import annotations

import array
import io
from collections import UserDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, tiny_target
from toy_folders import CHAT, letter_tokenizer

from flashdraft.decoding import prompt as module
from flashdraft.decoding.prompt import as_asked, content_text, is_one
from flashdraft.errors import InvalidParameter, InvalidPrompt
from flashdraft.generate import Model
from flashdraft.methods.autoregressive import Autoregressive

IDS = [7, 9, 12]
PARTS = (
    "{% for m in messages %}{{ m['role'][0] }} "
    "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}.{% endfor %}a "
)
STRICT = CHAT.replace("{{ m['content'] }}", "{{ m['content'] + '' }}")
USERS = CHAT.replace(
    "{{ m['role'][0] }} {{ m['content'] }}.",
    "{% if m['role'] != 'tool' %}{{ m['content'] }}.{% endif %}",
)


def language_model(template: str | None = CHAT) -> Model:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return Model(
        tiny_target("llama", lean=True), tokenizer, Autoregressive, eos=frozenset({EOS}), max_rows=4
    )


def told(lm: Model, prompt: Any) -> str:
    return str(lm.tokenizer.decode(lm.encode(prompt)))


class Column(list[Any]):
    """Like a column of pandas: dimensions, and a list on request."""

    ndim = 1

    def tolist(self) -> list[Any]:
        return list(self)


# --- types
#

ARE_IDS = [
    *(np.array(IDS, dtype=kind) for kind in (np.int64, np.int32, np.uint8, np.uint64, np.int16)),
    *(torch.tensor(IDS, dtype=kind) for kind in (torch.int64, torch.int32, torch.uint8)),
    [np.int64(7), np.int32(9), np.uint8(12)],
    list(torch.tensor(IDS)),
    [7, np.int64(9), torch.tensor(12)],
    tuple(IDS),
    deque(IDS),
    array.array("i", IDS),
    Column(IDS),
]


@pytest.mark.parametrize("ids", ARE_IDS, ids=repr)
def test_integers_of_every_kind_are_ids(ids: Any) -> None:
    assert is_one(ids)
    assert as_asked(ids) == IDS
    assert {type(token) for token in as_asked(ids)} == {int}


NO_PROMPTS: list[tuple[Any, str]] = [
    (b"\x07\t", "bytes"),
    (bytearray(b"\x07\t"), "bytearray"),
    (memoryview(b"\x07\t"), "memoryview"),
    (Path("prompt.txt"), "Path"),
    (io.StringIO("hi\nyou\n"), "StringIO"),
    ({"a", "b"}, "set"),
    (frozenset({5, 6}), "frozenset"),
    (None, "None"),
    (5, "int"),
    (5.5, "float"),
    (True, "bool"),
    (np.int64(5), "int"),
    (torch.tensor(5), "int"),
    ({"role": "user", "content": "a"}, "dict"),
    (UserDict({"input_ids": [IDS]}), "UserDict"),
    (object(), "object"),
    ([True, False], "True is not a token id"),
    ([5, True], "True is not a token id"),
    ([5, 6.0], "6.0 is not a token id"),
    ([5.5], "5.5 is not a token id"),
    ([5, "a"], "'a' is not a token id"),
    (np.array([True, False]), "True is not a token id"),
    (np.array([7.0, 9.0]), "7.0 is not a token id"),
    (torch.tensor([0.5]), "0.5 is not a token id"),
    (np.array([[7, 9]]), "an array of 2 dimensions"),
    (torch.tensor([IDS, IDS]), "an array of 2 dimensions"),
    ([{"role": "user", "content": "a"}, "b"], "list"),
    ([{"role": "user"}], "list"),
    ([{"role": 3, "content": "a"}], "turn 1: its role is 3"),
    ([{"role": "user", "content": None}], "turn 1: a turn's content is no text but None"),
    ([{"role": "user", "content": b"a"}], "turn 1: a turn's content is no text but bytes"),
    ([{"role": "user", "content": 5}], "turn 1: a turn's content is no text but int"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "a part of type 'input_audio'"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "a part without a text"),
]


@pytest.mark.parametrize(
    ("prompt", "named"),
    NO_PROMPTS,
    ids=[f"{type(prompt).__name__}: {named}" for prompt, named in NO_PROMPTS],
)
def test_what_is_no_prompt_is_refused_by_its_type(prompt: Any, named: str) -> None:
    """Alone, and among others."""
    lm = language_model()
    for given in (prompt, ["a", prompt]):
        with pytest.raises(InvalidPrompt) as error:
            lm.generate(given, max_new_tokens=2)
        message, *hint = str(error.value).split("\n")
        assert named in message
        assert [line[:6] for line in hint] == ["hint: "]


def test_hints_name_what_to_give() -> None:
    hints = {b"a": "prompt.decode()", Path("a"): "path.read_text()", frozenset("a"): "a list"}
    for prompt, hint in hints.items():
        with pytest.raises(
            InvalidPrompt, match=rf"hint: .*{hint.replace('(', '.').replace(')', '.')}"
        ):
            as_asked(prompt)
    with pytest.raises(InvalidPrompt, match="hint: give its `input_ids`"):
        as_asked({"input_ids": [[1]], "attention_mask": [[1]]})


SEVERAL = [
    ["a", "b"],
    ("a", "b"),
    np.array(["a", "b"]),
    np.array(["a", "b"], dtype=object),
    Column(["a", "b"]),
    (text for text in "ab"),
    {"x": "a", "y": "b"}.values(),
    ["a", [{"role": "user", "content": "b"}]],
    ["a", [{"role": "user", "content": [{"type": "text", "text": "b"}]}]],
]


@pytest.mark.parametrize("prompts", SEVERAL, ids=lambda prompts: type(prompts).__name__)
def test_several_prompts_are_answered_in_their_order(prompts: Any) -> None:
    lm = language_model()
    results = lm.generate(prompts, max_new_tokens=3)
    assert [result.tokens for result in results] == [
        lm.generate(text, max_new_tokens=3).tokens for text in "ab"
    ]


def test_arrays_of_ids_among_others() -> None:
    lm = language_model()
    ids = lm.encode("a")
    mixed = ["a", ids, np.array(ids), torch.tensor(ids), tuple(ids)]
    assert len({result.tokens for result in lm.generate(mixed, max_new_tokens=3)}) == 1
    assert lm.generate(np.array([]), max_new_tokens=3) == []
    with pytest.raises(InvalidPrompt, match="the prompt is empty"):
        lm.encode(np.array([], dtype=np.int64))
    with pytest.raises(InvalidPrompt, match="token id 99999999 is outside the vocabulary"):
        lm.encode(np.array([99999999]))


@pytest.mark.parametrize("params", [5, {"seed": 1}, "greedy", [{"seed": 1}]], ids=repr)
def test_parameters_of_another_type_are_refused(params: Any) -> None:
    with pytest.raises(InvalidParameter, match=r"^params is "):
        language_model().generate("a", params)


# --- content and templates
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hi", "hi"),
        ([], ""),
        (["hi"], "hi"),
        ([{"text": "hi"}], "hi"),
        (
            [
                {"type": "text", "text": "hi", "image_url": None},
                {"type": "input_text", "text": "you"},
            ],
            "hi\nyou",
        ),
    ],
)
def test_parts_of_text_are_text(content: Any, text: str) -> None:
    assert content_text(content) == text


@pytest.mark.parametrize(
    "template", [CHAT, PARTS, STRICT, CHAT.replace("['content']", "['content'] | trim")]
)
def test_text_and_its_parts_are_told_alike_by_every_template(template: str) -> None:
    """Some want a string, some want parts;
    neither must see the other, and a text must not vanish.
    """
    lm = language_model(template)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert (
        told(lm, "hi")
        == told(lm, parts)
        == told(lm, [{"role": "user", "content": "hi"}])
        == "u hi.a "
    )
    system = [
        {"role": "system", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": "hi"},
    ]
    assert told(lm, system) == "s be.u hi.a "


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "tool", "content": "c"},
]


def test_template_that_drops_a_turn_is_named() -> None:
    assert told(language_model(), TALK) == "u a.a b.t c.a "
    with pytest.raises(
        InvalidPrompt, match="the chat template of `llama` drops turns of role `tool`"
    ):
        language_model(USERS).encode(TALK)
    assert told(language_model(USERS), TALK[:2]) == "a.b.a "


def test_planted_template_check_that_sees_nothing_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PROBE", "")
    with pytest.raises(InvalidPrompt, match="drops turns of role `tool`"):
        language_model().encode(TALK)  # every turn would seem dropped: the probe is what tells


def test_calls_of_tools_need_a_template_that_tells_them() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    turns = [TALK[0], call, TALK[2]]
    with pytest.raises(InvalidPrompt, match="no `tool_calls`"):
        language_model().encode(turns)
    knows = CHAT.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{{ m.tool_calls[0].function.name if m.tool_calls }}",
    )
    assert told(language_model(knows), turns) == "u a.a f.t c.a "


def test_developers_are_systems_where_the_template_knows_none() -> None:
    turns = [{"role": "developer", "content": "be"}, TALK[0]]
    assert told(language_model(), turns) == "s be.u a.a "
    assert told(language_model(CHAT + "{# developer #}"), turns) == "d be.u a.a "
    refuses = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    )
    with pytest.raises(InvalidPrompt, match="System role not supported"):
        language_model(refuses).encode(turns)


BROKEN: dict[str, tuple[Any, str, str]] = {
    "cut short": ("{{ oops", "is damaged", "fetch the model's files again"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "is damaged", "fetch the model's files again"),
    "none by default": (
        {"rag": CHAT, "tool_use": CHAT},
        "several chat templates (rag, tool_use)",
        "`default`",
    ),
    "refuses": ("{{ raise_exception('no') }}", "refuses the conversation: no", "give turns"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_hint_for_a_template_that_tells_nothing_names_its_cause(name: str) -> None:
    template, cause, hint = BROKEN[name]
    with pytest.raises(InvalidPrompt) as error:
        language_model(template).encode("hi")
    assert cause in error.value.args[0]
    assert hint in str(error.value.hint)


def test_template_without_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("apply_chat_template requires jinja2 to be installed.")

    lm = language_model()
    monkeypatch.setattr(lm.tokenizer, "apply_chat_template", missing)
    with pytest.raises(InvalidPrompt) as error:
        lm.encode("hi")
    assert error.value.hint == "pip install jinja2"
