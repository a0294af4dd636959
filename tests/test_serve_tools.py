"""An answer's text becomes reasoning, content and calls, in any pieces; nothing of it is lost."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdraft.serve.tools import read_call
from flashdraft.serve.turns import Delta, TurnReader

NAMES = ("weather", "f")
F = '{"name": "f", "arguments": {"a": 1}}'
WEATHER = '{"name": "weather", "parameters": {"city": "Bonn"}}'
LONG = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>\n'
quick = settings(derandomize=True, deadline=None, max_examples=300)


class Read(NamedTuple):
    """What an answer was read as; calls without their ids."""

    content: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def joined(deltas: list[Delta]) -> Read:
    calls = [delta.call for delta in deltas if delta.call is not None]
    assert [call.index for call in calls] == list(range(len(calls)))
    return Read(
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        tuple((call.name, call.arguments) for call in calls),
    )


def read(pieces: list[str], *, thinks: bool = False, opened: bool = False) -> Read:
    reader = TurnReader(names=NAMES, thinks=thinks, opened=opened)
    deltas = []
    for piece in pieces:
        deltas += reader.push(piece)
    deltas += reader.end()
    assert "".join(delta.raw for delta in deltas) == "".join(pieces)
    return joined(deltas)


CALLS = [
    (f"<tool_call>\n{F}\n</tool_call>", Read("", "", (("f", '{"a": 1}'),))),
    (
        f"<tool_call>{F}</tool_call>\n<tool_call>{F}</tool_call>",
        Read("", "", (("f", '{"a": 1}'),) * 2),
    ),
    (LONG, Read("I look.", "", (("f", '{"a": "</tool_call>"}'),))),
    (f"<tool_call>{F}", Read("", "", (("f", '{"a": 1}'),))),
    (f"<tool_call>{F}</tool", Read("", "", (("f", '{"a": 1}'),))),
    (WEATHER, Read("", "", (("weather", '{"city": "Bonn"}'),))),
    (f"<|python_tag|>{WEATHER}", Read("", "", (("weather", '{"city": "Bonn"}'),))),
    (f"{WEATHER}; {F}", Read("", "", (("weather", '{"city": "Bonn"}'), ("f", '{"a": 1}')))),
    (f"{WEATHER} Here it is.", Read(" Here it is.", "", (("weather", '{"city": "Bonn"}'),))),
    (
        '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}}',
        Read("", "", (("f", '{"a": "é"}'),)),
    ),
    (
        '{"name": "f", "parameters": {"half": "\\ud800"}}',
        Read("", "", (("f", '{"half": "\\ud800"}'),)),
    ),
]
NO_CALLS = [
    "",
    "a text \n",
    "1 < 2, <tool",
    "<tool_call>",
    "<tool_call>\n",
    '<tool_call>\n{"name": "f", "arguments": {"a": ',
    '<tool_call>{"name": "f", "arguments": {}}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>',
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call> and on',
    "<tool_call><function=f></function></tool_call>",
    f"<tool_call>[{F}]</tool_call>",
    "<|python_tag|>print(1)",
    '{"name": "Ada", "parameters": {"born": 1815}}',
    '{"year": 1815}',
    '{"name": ["f"], "parameters": {}}',
    '{"name": "f", "parameters": {}',
    "{}",
    f"As JSON: {WEATHER}",
    '{"name": "f", "parameters": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
    '{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}",
]


@pytest.mark.parametrize(("text", "expected"), CALLS)
def test_calls_of_both_forms_are_read(text: str, expected: Read) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected


@pytest.mark.parametrize("text", NO_CALLS, ids=lambda text: text[:40])
def test_what_is_no_call_stays_content(text: str) -> None:
    assert read([text]) == Read(text)
    assert read(list(text)) == Read(text)


def test_no_call_without_an_offer() -> None:
    reader = TurnReader()
    assert reader.push(F) == [Delta(F, content=F)]
    assert reader.end() == []


THOUGHTS = [
    ("<think>\nhm\n</think>\n\nYes.\n", Read("Yes.\n", "hm")),
    ("\n<think>hm</think>Yes.", Read("Yes.", "hm")),
    ("<think>\n\n</think>\n\nYes.", Read("Yes.")),
    ("<think>never ends </thi", Read("", "never ends </thi")),
    ("Yes, <think> is a mark.", Read("Yes, <think> is a mark.")),
    (
        f"<think>call f</think>\n\n<tool_call>{F}</tool_call>",
        Read("", "call f", (("f", '{"a": 1}'),)),
    ),
    (f"<think><tool_call>{F}</tool_call>", Read("", f"<tool_call>{F}</tool_call>")),
]


@pytest.mark.parametrize(("text", "expected"), THOUGHTS)
def test_thoughts_at_the_beginning_are_reasoning(text: str, expected: Read) -> None:
    assert read([text], thinks=True) == expected
    assert read(list(text), thinks=True) == expected


def test_thoughts_that_the_prompt_opened_are_reasoning() -> None:
    for text in ("\nhm\n</think>\n\nYes.", "<think>\nhm</think>Yes."):
        assert read(list(text), thinks=True, opened=True) == Read("Yes.", "hm")
    assert read(["hm"], thinks=True, opened=True) == Read("", "hm")


def test_thoughts_of_a_model_without_them_are_content() -> None:
    assert read(["<think>hm</think>Yes."]) == Read("<think>hm</think>Yes.")


PARTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", F, WEATHER, "{"),
        *(
            "}",
            '"',
            "\\",
            ";",
            " ",
            "\n",
            "a",
            "<",
            "</",
            '{"name": ',
            '{"name": "x"}',
            "[",
            "</tool_call>",
        ),
    ]
)


@quick
@given(
    text=st.lists(PARTS, max_size=12).map("".join),
    thinks=st.booleans(),
    opened=st.booleans(),
    data=st.data(),
)
def test_any_pieces_give_the_same_answer(
    text: str, thinks: bool, opened: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], thinks=thinks, opened=opened)
    assert read(pieces, thinks=thinks, opened=opened) == whole
    assert read(list(text), thinks=thinks, opened=opened) == whole


def test_planted_reader_that_does_not_hold_marks_back_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashdraft.serve.turns._without_beginning", lambda text, marks: text)
    assert read([LONG]) != read(list(LONG))


def test_nothing_of_a_mark_is_given_out_before_it_is_whole() -> None:
    reader = TurnReader(names=NAMES, thinks=True)
    seen = [delta.content for char in LONG for delta in reader.push(char)]
    assert "".join(seen) == "I look."


def test_text_that_can_be_no_mark_is_given_out_at_once() -> None:
    reader = TurnReader(names=NAMES, thinks=True)
    assert [reader.push(text)[-1].content for text in ("Hi", " there", " <b>")] == [
        "Hi",
        " there",
        " <b>",
    ]
    assert [delta.content for delta in reader.push('{"name": "Ada')] == ['{"name": "Ada']


def test_long_calls_are_read_in_linear_time() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "</tool_call>" * 4000
    assert read([text[at : at + 8] for at in range(0, len(text), 8)]) == Read(text)


def test_whole_answer_and_its_finish_reason() -> None:
    reader = TurnReader(names=NAMES, thinks=True)
    turn = reader.read(f"<think>hm</think><tool_call>{F}</tool_call>")
    assert (turn.content, turn.reasoning) == (None, "hm")
    (call,) = turn.calls
    assert call.to_dict() == {
        "id": call.id,
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert (reader.finish_reason("stop"), reader.finish_reason("length")) == (
        "tool_calls",
        "length",
    )

    plain = TurnReader(names=NAMES)
    assert plain.read("") == ("", None, ())
    assert plain.finish_reason("stop") == "stop"


def test_ids_of_calls_differ() -> None:
    first, second = (read_call(F, NAMES, index) for index in (0, 1))
    assert first is not None
    assert second is not None
    assert first.id != second.id
    assert json.loads(first.arguments) == {"a": 1}
