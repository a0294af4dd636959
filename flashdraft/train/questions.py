"""What a row of a data set asks: a text, or a conversation up to its last user turn.

Knows the fields and roles of the well-known sets: ShareGPT, OpenAI messages, Alpaca, Dolly, OpenOrca, UltraChat, WildChat,
LMSYS, Open Assistant, LIMA, Capybara, MetaMath, Nemotron, preference pairs and their like. Does not know files.
What belongs to a question is kept with it (a system prompt, a context, earlier turns); a row that has something which
cannot be kept (an image, definitions of tools) asks nothing here: another question would be asked in silence.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from flashdraft.decoding.prompt import content_text

__all__ = ["FIELDS", "AsksNothing", "as_prompt"]

Turn = tuple[str, str | ValueError]  # role and content, or why that is no text
Asked = str | list[dict[str, str]]

# fields that hold turns; those behind the second one count where they hold a list
CONVERSATIONS = (
    "messages",
    "conversations",
    "conversation",
    "conversation_a",
    "dialogue",
    "dialog",
    "turns",
    "chat",
    "data",
)
QUESTIONS = ("question", "instruction", "prompt", "query", "problem", "inputs", "input")
FIELDS = (*CONVERSATIONS[:2], *QUESTIONS)  # as messages name them
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")
BESIDES: tuple[str, ...] = (
    "input",
    "context",
    "passage",
    "document",
    "article",
    "story",
    "background",
    "starter_code",
)
BESIDES += ("choices", "options")
BESIDES += ("contexts", "passages", "documents", "paragraph", "paragraphs", "schema")
LETTERED = (
    "{}",
    "option_{}",
    "option{}",
    "op{}",
    "choice_{}",
)  # columns of a question with choices, one a letter
CONTEXTS = ("context", "passage", "document")  # of these, the ones that turns may need
UNSEEN = (
    "tools",
    "functions",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
    "attachments",
)  # what no text can show
CALLS = ("tool_calls", "function_call")
PAIRS = [
    ("input", "output"),
    ("question", "answer"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("prompt", "response"),
]
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "ai"),
        "assistant",
    ),
    **dict.fromkeys(
        ("claude", "gemini", "palm", "llama", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"
    ),
}
_LONG = 40  # characters of a context that do not stand in a question by chance
_KNOWN_ROLES = "human, user, gpt, assistant, system, tool and their like"
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


class AsksNothing(ValueError):
    """The question of a row is there, and empty."""


def as_prompt(row: Any) -> Asked:
    """What a row asks: text, or a conversation of several turns. Raises ValueError saying why it asks nothing.

    A conversation ends with its last user turn: what an assistant said before is context, and its last word is the target's.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    unseen = _unseen(row)
    if unseen is not None:
        raise ValueError(f"it has `{unseen}`, without which the question would be another one")

    turns = []
    for role, content in _with_system(row, _asked_turns(row)):
        if isinstance(content, ValueError):
            raise content
        turns.append({"role": role, "content": content})
    if not turns[-1]["content"].strip():
        raise AsksNothing("the prompt is empty")

    asked: Asked = turns[0]["content"] if len(turns) == 1 else turns
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (surrogates without their partners)") from None
    return asked


def _asked_turns(row: Mapping[str, Any]) -> list[Turn]:
    """The turns up to the last one of the user, which is the question."""
    empty = False
    for name in CONVERSATIONS:
        value = _unpacked(row.get(name))
        if _is_missing(value) or not (
            isinstance(value, (list, tuple, Mapping)) or name in CONVERSATIONS[:2]
        ):
            empty |= isinstance(value, (list, tuple)) and name in CONVERSATIONS[:2]
            continue
        if name == "turns" and isinstance(value, (list, tuple)) and isinstance(value[0], str):
            raise ValueError("`turns` holds several questions without their answers")
        turns = _up_to_the_question(_turns(value))
        _check_context(row, turns)
        return turns

    if any(not _is_missing(row.get(name)) for name in QUESTIONS):
        return _question(row)
    if empty:
        raise ValueError("the conversation has no user turn")
    if "text" in row and "role" in row:
        return [("user", _message_of_a_tree(row))]
    chosen = row.get("chosen")
    if isinstance(chosen, str):
        chosen = _transcript(chosen)
    if isinstance(chosen, (list, tuple)) and chosen:
        return _up_to_the_question(_turns(chosen))
    if any(isinstance(row.get(name), str) for name in QUESTIONS):
        raise AsksNothing("the prompt is empty")
    raise ValueError(f"none of the fields {', '.join(FIELDS)}")


def _unseen(part: Mapping[str, Any]) -> str | None:
    """The first field of a row or a turn that holds what no text can show."""
    for name in UNSEEN:
        if not _is_missing(part.get(name)) and part[name] not in ("", "[]", "{}", "null", False):
            return name
    return None


def _transcript(text: str) -> list[dict[str, str]] | None:
    """The turns of a conversation that was written as one text; None for any other text."""
    if not _TRANSCRIPT.match(text):
        return None
    _, *parts = _TRANSCRIPT.split(text)
    return [
        {"role": role, "content": said.strip()}
        for role, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _check_context(row: Mapping[str, Any], turns: list[Turn]) -> None:
    """Raises ValueError for a context beside a conversation: nothing says where in it it stands."""
    told = "\n".join(str(content) for _, content in turns)
    for name in CONTEXTS:
        if _besides(row, name) not in told:
            raise ValueError(
                f"it has `{name}` beside its turns, without which the question would be another one"
            )


def _up_to_the_question(turns: list[Turn]) -> list[Turn]:
    while turns and turns[-1][0] != "user":
        turns.pop()
    if not turns:
        raise ValueError("the conversation has no user turn")
    return turns


# --- conversations ---------------------------------------------------------------------------------------------------


def _turns(value: Any) -> list[Turn]:
    if isinstance(value, Mapping):
        value = _by_turn(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"not a list of turns, each from one of {_KNOWN_ROLES}")

    turns: list[Turn] = []
    for number, turn in enumerate(value):
        if isinstance(turn, str):
            turns.append(("assistant" if number % 2 else "user", turn))
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            turns += _pair(*turn)
        elif isinstance(turn, Mapping):
            turns += _turn(turn)
        else:
            raise ValueError(f"not a list of turns, each from one of {_KNOWN_ROLES}")
    return turns


def _turn(turn: Mapping[str, Any]) -> list[Turn]:
    role = _first(turn, "role", "from", "speaker", "author")
    if role is None:
        for ours, theirs in PAIRS:
            if ours in turn and theirs in turn:
                return _pair(turn[ours], turn[theirs])
    if not isinstance(role, str):
        raise ValueError(f"not a list of turns, each from one of {_KNOWN_ROLES}")

    name = role.strip().lower()
    known = "assistant" if name.startswith(("gpt-", "gpt4", "claude-")) else ROLES.get(name)
    if known is None:
        raise ValueError(f"a turn is from {role!r:.40}; roles are {_KNOWN_ROLES}")
    unseen = _unseen(turn)
    if unseen is not None:
        return [(known, ValueError(f"a turn has `{unseen}`, which no text can show"))]
    if any(turn.get(calls) for calls in CALLS):
        return [(known, ValueError("a turn calls tools, which no text can show"))]
    return [(known, _content(_first(turn, "content", "value", "text", "message")))]


def _content(content: Any) -> str | ValueError:
    """Its text; an error where it is none, to be raised if the turn is asked: the last answer may be anything."""
    try:
        return content_text(content)
    except ValueError as error:
        return error


def _pair(question: Any, answer: Any) -> list[Turn]:
    return [("user", _content(question)), ("assistant", _content(answer))]


def _by_turn(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dictionary for each turn, of a dictionary of columns."""
    if not columns or not all(isinstance(column, (list, tuple)) for column in columns.values()):
        raise ValueError(f"not a list of turns, each from one of {_KNOWN_ROLES}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("the columns of its turns are of different lengths")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _message_of_a_tree(row: Mapping[str, Any]) -> str:
    """The text of a message of Open Assistant, if it begins its tree."""
    if ROLES.get(str(row["role"]).lower()) != "user":
        raise ValueError("it is an answer, without its question")
    if not _is_missing(row.get("parent_id")):
        raise ValueError("it follows a message that it does not hold")
    return str(row["text"])


# --- questions -------------------------------------------------------------------------------------------------------


def _question(row: Mapping[str, Any]) -> list[Turn]:
    """The question with what belongs to it, after the earlier turns of `history`."""
    texts: dict[str, str] = {}
    listed: Any = None
    odd = ""
    for name in QUESTIONS:
        value = row.get(name)
        if isinstance(value, Mapping) and "text" in value:  # the root of a tree
            value = value["text"]
        if isinstance(value, str):
            texts[name] = value
        elif isinstance(value, (list, tuple)) and value and not (name == "input" and texts):
            listed = value
        elif not _is_missing(value) and not (odd or texts):
            odd = name
    if listed is not None:
        if len(listed) > 1 and all(isinstance(one, str) for one in listed):
            raise ValueError("it holds several questions without their answers")
        turns = _up_to_the_question(_turns(listed))
        if any(text not in str(turns[-1][1]) for text in texts.values()):
            raise ValueError("it asks twice: a conversation and a text differ")
        return turns
    if not texts:
        raise ValueError(f"`{odd}` is no text")

    definition = _besides(row, "definition")  # of a task, of which `input` is an instance
    if definition and "instruction" not in texts and texts.keys() & {"input", "inputs"}:
        texts["instruction"] = definition
    name, main = _main(texts)
    transcript = _transcript(main)
    if transcript is not None:
        return _up_to_the_question(_turns(transcript))

    parts = [main.strip()]
    for besides in BESIDES:
        text = "" if besides == name else _besides(row, besides)
        is_told = besides != "input" and len(text) >= _LONG and text in main
        if text and not is_told:
            parts.append(text)
    parts += _choices(row)
    whole = "\n".join(part for part in parts if part)
    turns = _turns(row["history"]) if row.get("history") else []
    return [*turns, ("user", main if whole == parts[0] and name != "instruction" else whole)]


def _main(texts: Mapping[str, str]) -> tuple[str, str]:
    """The field that asks, and its text; an instruction goes before the question that it is about."""
    asking = {name: text for name, text in texts.items() if name != "input"} or dict(texts)
    asking = {name: text for name, text in asking.items() if text.strip()} or asking
    for name, text in [*asking.items()]:
        others = [other for key, other in asking.items() if key != name]
        if any(text.strip() in other for other in others):
            del asking[name]

    names = [*asking]
    if len(names) == 1:
        return names[0], asking[names[0]]
    if len(names) == 2 and "instruction" in names:
        names.sort(key=lambda name: name != "instruction")
        return "instruction", "\n".join(asking[name].strip() for name in names)
    raise ValueError(f"it asks twice: `{names[0]}` and `{names[1]}` differ")


def _besides(row: Mapping[str, Any], name: str) -> str:
    """What a row has beside its question and belongs to it, as text."""
    value = row.get(name)
    if (_is_missing(value) or value == "") and name == "input":
        value = _first_instance(row)
    if (
        isinstance(value, Mapping)
        and value
        and all(isinstance(text, str) for text in value.values())
    ):
        value = [f"{key}. {text}" for key, text in value.items()]
    if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        value = "\n".join(value)
    if _is_missing(value) or value is False:
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"`{name}`, which belongs to the question, is no text")
    return str(value).strip()


def _choices(row: Mapping[str, Any]) -> list[str]:
    """Those that have columns of their own: at least the first two letters."""
    for pattern in LETTERED:
        columns = [
            (letter, pattern.format(each))
            for letter in "ABCDEFGH"
            for each in (letter, letter.lower())
        ]
        told = [
            f"{letter}. {_besides(row, column)}"
            for letter, column in columns
            if not _is_missing(row.get(column))
        ]
        if len(told) > 1 and told[0].startswith("A. ") and told[1].startswith("B. "):
            return told
    return []


def _first_instance(row: Mapping[str, Any]) -> Any:
    """The input of a task of self-instruct."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, Sequence) and instances else None
    return first.get("input") if isinstance(first, Mapping) else None


def _with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns behind the row's own system prompt, which may stand in them already."""
    told = [_besides(row, name) for name in SYSTEMS]
    distinct = [*dict.fromkeys(text for text in told if text)]
    if not distinct:
        return turns
    first = str(turns[0][1]).strip() if turns[0][0] == "system" else distinct[0]
    if len(distinct) > 1 or first != distinct[0]:
        raise ValueError("it has two system prompts that differ")
    return turns if turns[0][0] == "system" else [("system", distinct[0]), *turns]


def _is_missing(value: Any) -> bool:
    """Nothing: none, not a number (as tables have it), an empty list or dictionary."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or (isinstance(value, (list, tuple, Mapping)) and not value)


def _unpacked(value: Any) -> Any:
    """A list that was written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)
