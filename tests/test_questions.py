"""What rows of the well-known sets ask: their fields, roles and parts; and that nothing of a
question is dropped in silence.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from flashdraft.train.questions import as_prompt

SYSTEM = {"role": "system", "content": "be short"}
USER = {"role": "user", "content": "hi"}
TALK = [USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def share(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": what} for who, what in turns]


WELL_KNOWN: dict[str, tuple[dict[str, Any], Any]] = {
    "sharegpt": (
        {
            "id": "1",
            "conversations": share(("human", "hi"), ("gpt", "yes"), ("human", "why"), ("gpt", "x")),
        },
        TALK,
    ),
    "sharegpt-chatgpt": (
        {
            "conversations": share(
                ("user", "hi"), ("chatgpt", "yes"), ("human", "why"), ("bing", "x")
            )
        },
        TALK,
    ),
    "sharegpt-capitals": (
        {"conversations": share(("Human", "hi"), ("GPT", "yes"), ("USER ", "why"), ("Bard", "x"))},
        TALK,
    ),
    "sharegpt-model": (
        {"conversations": share(("human", "hi"), ("gpt-4o", "yes"), ("human", "why"))},
        TALK,
    ),
    "llamafactory-tools": (
        {
            "conversations": share(
                ("human", "hi"), ("function_call", "f()"), ("observation", "4"), ("human", "why")
            )
        },
        [USER, {"role": "assistant", "content": "f()"}, {"role": "tool", "content": "4"}, TALK[2]],
    ),
    "llamafactory-system": (
        {"system": "be short", "conversations": share(("human", "hi"), ("gpt", "x"))},
        [SYSTEM, USER],
    ),
    "openhermes": (
        {
            "conversations": share(("human", "hi"), ("gpt", "x")),
            "system_prompt": None,
            "title": "t",
        },
        "hi",
    ),
    "openthoughts": (
        {"system": "be short", "conversations": share(("user", "hi"), ("assistant", "x"))},
        [SYSTEM, USER],
    ),
    "slimorca": (
        {"conversations": share(("system", "be short"), ("human", "hi"), ("gpt", "x"))},
        [SYSTEM, USER],
    ),
    "openai": (
        {"messages": [SYSTEM, *TALK, {"role": "assistant", "content": "x"}]},
        [SYSTEM, *TALK],
    ),
    "openai-developer": (
        {"messages": [{"role": "developer", "content": "be short"}, USER]},
        [SYSTEM, USER],
    ),
    "openai-parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        "hi",
    ),
    "openai-last-call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "hi",
    ),
    "openai-call-and-answer": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{}]},
                {"role": "tool", "content": "4"},
            ],
            "tools": [],
        },
        "hi",
    ),
    "same-system-twice": ({"system": "be short", "messages": [SYSTEM, USER]}, [SYSTEM, USER]),
    "alpaca": ({"instruction": "add", "input": "1 and 2", "output": "3"}, "add\n1 and 2"),
    "alpaca-number": ({"instruction": "double it", "input": 0, "output": "0"}, "double it\n0"),
    "alpaca-from-a-table": (
        {"instruction": "hi", "input": math.nan, "system": math.nan, "output": "x"},
        "hi",
    ),
    "alpaca-short-input": ({"instruction": "count 1 and 11", "input": "1"}, "count 1 and 11\n1"),
    "alpaca-system": (
        {"system": "be short", "instruction": "hi", "input": "", "output": "x"},
        [SYSTEM, USER],
    ),
    "alpaca-history": (
        {"instruction": "why", "input": "", "history": [["hi", "yes"]], "output": "x"},
        TALK,
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"},
        "Who?\nAnn did.",
    ),
    "dolly-open": (
        {"instruction": "hi", "context": "", "response": "x", "category": "open_qa"},
        "hi",
    ),
    "squad": (
        {
            "id": "1",
            "title": "t",
            "context": "Ann did.",
            "question": "Who?",
            "answers": {"text": []},
        },
        "Who?\nAnn did.",
    ),
    "boolq": ({"question": "is it", "passage": "It is.", "answer": True}, "is it\nIt is."),
    "aqua": (
        {"question": "how many", "options": ["A) 1", "B) 2"], "correct": "A"},
        "how many\nA) 1\nB) 2",
    ),
    "medqa": (
        {"question": "which", "options": {"A": "one", "B": "two"}, "answer": "A"},
        "which\nA. one\nB. two",
    ),
    "openorca": (
        {"id": "1", "system_prompt": "be short", "question": "hi", "response": "x"},
        [SYSTEM, USER],
    ),
    "orca-empty-system": ({"system_prompt": "", "question": "hi", "response": "x"}, "hi"),
    "ultrachat": ({"id": "1", "data": ["hi", "yes", "why", "x"]}, TALK),
    "ultrachat-200k": (
        {
            "prompt": "hi",
            "prompt_id": "1",
            "messages": [*TALK, {"role": "assistant", "content": "x"}],
        },
        TALK,
    ),
    "contexts": (
        {"question": "Who?", "contexts": ["Ann did.", "Bob did not."]},
        "Who?\nAnn did.\nBob did not.",
    ),
    "schema": (
        {"question": "how many", "schema": "CREATE TABLE t (a INT)", "sql": "x"},
        "how many\nCREATE TABLE t (a INT)",
    ),
    "mmlu-columns": (
        {"question": "which", "A": "one", "B": "two", "answer": "A"},
        "which\nA. one\nB. two",
    ),
    "medmcqa": (
        {"question": "which", "opa": "one", "opb": "two", "cop": 1},
        "which\nA. one\nB. two",
    ),
    "option-columns": (
        {"question": "which", "option_a": "one", "option_b": "two"},
        "which\nA. one\nB. two",
    ),
    "natural-instructions": (
        {"definition": "add", "inputs": "1 and 2", "targets": "3"},
        "add\n1 and 2",
    ),
    "super-natural-instructions": (
        {"definition": ["add"], "input": "1 and 2", "output": ["3"]},
        "add\n1 and 2",
    ),
    "hh-prompt": (
        {"prompt": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant:", "chosen": "x"},
        TALK,
    ),
    "one-in-a-list": ({"prompt": ["hi"]}, "hi"),
    "picture-of-nobody": ({"messages": [{**USER, "images": []}]}, "hi"),
    "lima": ({"conversations": ["hi", "x"], "source": "s"}, "hi"),
    "wildchat": (
        {
            "conversation": [
                {**USER, "language": "English"},
                {"role": "assistant", "content": "x"},
            ],
            "model": "g",
        },
        "hi",
    ),
    "lmsys": (
        {"conversation_id": "1", "conversation": [{"content": "hi", "role": "user"}], "model": "v"},
        "hi",
    ),
    "arena": (
        {"conversation_a": [USER, {"role": "assistant", "content": "x"}], "conversation_b": [USER]},
        "hi",
    ),
    "capybara": (
        {
            "source": "s",
            "conversation": [{"input": "hi", "output": "yes"}, {"input": "why", "output": "x"}],
        },
        TALK,
    ),
    "oasst-flat": (
        {"message_id": "1", "parent_id": None, "text": "hi", "role": "prompter", "lang": "en"},
        "hi",
    ),
    "oasst-tree": (
        {"message_tree_id": "1", "prompt": {"text": "hi", "role": "prompter", "replies": []}},
        "hi",
    ),
    "metamath": ({"type": "t", "query": "hi", "original_question": "h", "response": "x"}, "hi"),
    "numina": (
        {
            "source": "s",
            "problem": "hi",
            "solution": "x",
            "messages": [USER, {"role": "assistant", "content": "x"}],
        },
        "hi",
    ),
    "humaneval-like": ({"prompt": "def f():\n", "canonical_solution": "  return 1"}, "def f():\n"),
    "apps": (
        {"question": "write f", "starter_code": "def f():", "solutions": "[]"},
        "write f\ndef f():",
    ),
    "oss-instruct": ({"lang": "python", "problem": "hi", "solution": "x"}, "hi"),
    "pairs": ({"input": "hi", "output": "x"}, "hi"),
    "flan": ({"inputs": "hi", "targets": "x", "task": "t"}, "hi"),
    "nemotron": ({"input": [USER], "output": "x", "system_prompt": "be short"}, [SYSTEM, USER]),
    "dpo": ({"prompt": "hi", "chosen": "x", "rejected": "y"}, "hi"),
    "dpo-messages": (
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": "x"}], "rejected": []},
        "hi",
    ),
    "dpo-whole": (
        {"chosen": [USER, {"role": "assistant", "content": "x"}], "rejected": [USER]},
        "hi",
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant: x", "rejected": ""},
        TALK,
    ),
    "orca-dpo": (
        {"system": "be short", "question": "hi", "chosen": "a", "rejected": "b"},
        [SYSTEM, USER],
    ),
    "columns": ({"conversations": {"from": ["human", "gpt"], "value": ["hi", "x"]}}, "hi"),
    "as-text": ({"messages": '[{"role": "user", "content": "hi"}]'}, "hi"),
    "empty-list": ({"messages": [], "prompt": "hi"}, "hi"),
    "instruction-and-question": (
        {"instruction": "Answer briefly.", "question": "hi"},
        "Answer briefly.\nhi",
    ),
    "question-within-its-prompt": (
        {"question": "Who?", "prompt": "Ann did. Who?"},
        "Ann did. Who?",
    ),
}


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_row_of_a_well_known_set_asks_its_question(name: str) -> None:
    row, expected = WELL_KNOWN[name]
    assert as_prompt(row) == expected


ASK_NOTHING: dict[str, tuple[Any, str]] = {
    "text-only": ({"text": "### Human: hi### Assistant: yes"}, "none of the fields"),
    "no-row": (["hi"], "not a JSON object"),
    "unknown-role": (
        {"conversations": share(("human", "hi"), ("moderator", "stop"), ("human", "why"))},
        "'moderator'",
    ),
    "no-user": ({"conversations": share(("gpt", "hi"))}, "no user turn"),
    "nobody": ({"conversations": []}, "no user turn"),
    "image-part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, IMAGE]}]},
        "'image_url'",
    ),
    "image-before": (
        {"messages": [{"role": "user", "content": [IMAGE]}, *TALK[1:]]},
        "'image_url'",
    ),
    "llava": (
        {"image": "a.jpg", "conversations": share(("human", "<image>\nhi"), ("gpt", "x"))},
        "`image`",
    ),
    "images": ({"prompt": "hi", "images": ["a.jpg"]}, "`images`"),
    "xlam": ({"query": "hi", "tools": "[{}]", "answers": "[]"}, "`tools`"),
    "tools": ({"messages": [USER], "tools": [{"type": "function"}]}, "`tools`"),
    "call-before": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{}]}, USER]},
        "calls tools",
    ),
    "content-none": (
        {"messages": [USER, {"role": "assistant", "content": None}, USER]},
        "no text but None",
    ),
    "empty-last": (
        {"conversations": share(("human", "hi"), ("gpt", "x"), ("human", ""))},
        "the prompt is empty",
    ),
    "context-beside-turns": (
        {"messages": TALK, "context": "Ann did."},
        "`context` beside its turns",
    ),
    "odd-context": (
        {"question": "Who?", "context": {"title": ["t"], "sentences": [["s"]]}},
        "`context`",
    ),
    "odd-input": ({"instruction": "hi", "input": {"a": 1}}, "`input`"),
    "two-systems": (
        {"system": "be short", "messages": [{"role": "system", "content": "be long"}, USER]},
        "two system prompts",
    ),
    "odd-system": ({"system": 3.5j, "prompt": "hi"}, "`system`"),
    "two-questions": ({"prompt": "hi", "question": "why"}, "asks twice: `question` and `prompt`"),
    "questions-of-a-benchmark": ({"turns": ["hi", "why"]}, "several questions"),
    "questions-in-a-list": ({"prompt": ["hi", "why"], "reference": []}, "several questions"),
    "picture-in-a-turn": ({"messages": [{**USER, "images": ["a.png"]}]}, "a turn has `images`"),
    "file-in-a-turn": (
        {"messages": [{**USER, "attachments": ["a.pdf"]}, *TALK[1:]]},
        "a turn has `attachments`",
    ),
    "odd-passages": ({"query": "Who?", "passages": {"passage_text": ["Ann did."]}}, "`passages`"),
    "oasst-answer": (
        {"text": "yes", "role": "assistant", "parent_id": "1"},
        "without its question",
    ),
    "oasst-later": ({"text": "why", "role": "prompter", "parent_id": "1"}, "it does not hold"),
    "table-nan": ({"prompt": math.nan}, "none of the fields"),
    "half-a-character": ({"prompt": "a\ud83d"}, "half a character"),
    "half-a-character-before": (
        {"messages": [{"role": "user", "content": "\udc00"}, *TALK[1:]]},
        "half a character",
    ),
}


@pytest.mark.parametrize("name", ASK_NOTHING)
def test_row_that_would_ask_something_else_is_refused_by_cause(name: str) -> None:
    row, cause = ASK_NOTHING[name]
    with pytest.raises(ValueError, match=cause):
        as_prompt(row)


def test_long_context_that_the_prompt_holds_already_is_not_told_twice() -> None:
    context = "Ann wrote the book in the year 1900, in a house by the sea."
    assert as_prompt({"prompt": f"{context}\nWho?", "context": context}) == f"{context}\nWho?"
    assert (
        as_prompt(
            {"messages": [{"role": "user", "content": f"{context} Who?"}], "context": context}
        )
        == f"{context} Who?"
    )


def test_zero_characters_and_line_separators_stay_in_a_question() -> None:
    for text in ("a\0b", "a\u2028b", "a\rb", "a\r\nb", "\ufeffa"):
        assert as_prompt({"prompt": text}) == text
