"""What a row of a data set asks: a text, or a conversation up to its last user turn.

Knows the fields and roles of the well-known sets: ShareGPT, OpenAI messages, Alpaca, Dolly,
OpenOrca, UltraChat, WildChat, LMSYS, Open Assistant, LIMA, Capybara, MetaMath, Nemotron, preference
pairs and their like. Does not know files.
What belongs to a question is kept with it (a system prompt, a context, earlier turns). A row that
has something which cannot be kept (an image, definitions of tools) asks nothing here: without it
another question would be asked, and nobody told.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from flashdraft.decoding.prompt import content_text

__all__ = ["FIELDS", "AsksNothing", "as_prompt"]

Row = Mapping[str, object]
Asked = str | list[dict[str, str]]

# fields that hold a conversation: the first two always, the others where they hold a list
_PLAIN_CONVERSATIONS = ("messages", "conversations")
CONVERSATIONS = (
    *_PLAIN_CONVERSATIONS,
    "conversation",
    "conversation_a",
    "dialogue",
    "dialog",
    "turns",
    "chat",
    "data",
)
QUESTIONS = ("question", "instruction", "prompt", "query", "problem", "inputs", "input")
FIELDS = (*_PLAIN_CONVERSATIONS, *QUESTIONS)  # as messages name them
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction")

# what stands beside a question and belongs to it, in the order in which it follows the question
BESIDES = (
    "input",
    "context",
    "passage",
    "document",
    "article",
    "story",
    "background",
    "starter_code",
    "choices",
    "options",
    "contexts",
    "passages",
    "documents",
    "paragraph",
    "paragraphs",
    "schema",
)
CONTEXTS = ("context", "passage", "document")  # of these, the ones that a conversation may need
LETTERED = ("{}", "option_{}", "option{}", "op{}", "choice_{}")  # columns of choices, one a letter
_LONG = 40  # characters of a context that do not stand in a question by chance

# what no text can show
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
)
CALLS = ("tool_calls", "function_call")
_NOTHING = ("", "[]", "{}", "null", False)  # how a set writes that a row has none of these

# fields of a turn that holds a question and its answer
PAIRS = [
    ("input", "output"),
    ("question", "answer"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("prompt", "response"),
]
ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "claude": "assistant",
    "gemini": "assistant",
    "palm": "assistant",
    "llama": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_VERSIONED_ASSISTANTS = ("gpt-", "gpt4", "claude-")  # gpt-4o, claude-3-opus
_KNOWN_ROLES = "human, user, gpt, assistant, system, tool and their like"
_NO_TURNS = f"not a list of turns, each from one of {_KNOWN_ROLES}"
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


class Turn(NamedTuple):
    role: str
    content: str | ValueError  # or why it is no text, to be raised if the turn is asked


class AsksNothing(ValueError):
    """The question of a row is there, and empty."""


def as_prompt(row: object) -> Asked:
    """What a row asks: text, or a conversation of several turns.

    A conversation ends with its last user turn: what an assistant said before is context, and its
    last word is the target's. Raises ValueError saying why a row asks nothing.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    unseen = _unseen(row)
    if unseen is not None:
        raise ValueError(f"it has `{unseen}`, without which the question would be another one")

    turns = []
    for turn in _with_system(row, _asked_turns(row)):
        if isinstance(turn.content, ValueError):
            raise turn.content
        turns.append({"role": turn.role, "content": turn.content})

    question = turns[-1]["content"]
    if not question.strip():
        raise AsksNothing("the prompt is empty")
    asked: Asked = question if len(turns) == 1 else turns
    _check_characters(asked)
    return asked


def _check_characters(asked: Asked) -> None:
    """Raises ValueError for what cannot be written."""
    try:
        json.dumps(asked, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (surrogates without their partners)") from None


def _unseen(part: Row) -> str | None:
    """The first field of a row or a turn that holds what no text can show."""
    for name in UNSEEN:
        value = part.get(name)
        if not _is_missing(value) and value not in _NOTHING:
            return name
    return None


def _asked_turns(row: Row) -> list[Turn]:
    """The turns up to the last one of the user, which is the question."""
    conversation = _conversation(row)
    if conversation is not None:
        turns = _up_to_the_question(_turns(conversation))
        _check_context(row, turns)
        return turns

    if any(not _is_missing(row.get(name)) for name in QUESTIONS):
        return _question(row)
    if _has_empty_conversation(row):
        raise ValueError("the conversation has no user turn")
    if "text" in row and "role" in row:
        return [Turn("user", _message_of_a_tree(row))]

    preferred = _preferred_conversation(row)
    if preferred:
        return _up_to_the_question(_turns(preferred))
    raise ValueError(f"none of the fields {', '.join(FIELDS)}")


def _conversation(row: Row) -> object | None:
    """The first field that holds a conversation, unpacked; None where the row has none."""
    for name in CONVERSATIONS:
        value = _unpacked(row.get(name))
        if _is_missing(value):
            continue
        if not isinstance(value, (list, tuple, Mapping)) and name not in _PLAIN_CONVERSATIONS:
            continue

        if name == "turns" and isinstance(value, (list, tuple)) and isinstance(value[0], str):
            raise ValueError("`turns` holds several questions without their answers")
        return value
    return None


def _has_empty_conversation(row: Row) -> bool:
    for name in _PLAIN_CONVERSATIONS:
        value = _unpacked(row.get(name))
        if isinstance(value, (list, tuple)) and not value:
            return True
    return False


def _preferred_conversation(row: Row) -> Sequence[object] | None:
    """The better one of a preference pair."""
    chosen = row.get("chosen")
    if isinstance(chosen, str):
        return _transcript(chosen)
    if isinstance(chosen, (list, tuple)):
        return chosen
    return None


def _transcript(text: str) -> list[dict[str, str]] | None:
    """The turns of a conversation that was written as one text; None for any other text."""
    if not _TRANSCRIPT.match(text):
        return None

    parts = _TRANSCRIPT.split(text)
    roles = parts[1::2]  # nothing stands before the first one
    told = parts[2::2]
    turns = []
    for role, said in zip(roles, told, strict=True):
        turns.append({"role": role, "content": said.strip()})
    return turns


def _message_of_a_tree(row: Row) -> str:
    """The text of a message of Open Assistant, if it begins its tree."""
    if ROLES.get(str(row["role"]).lower()) != "user":
        raise ValueError("it is an answer, without its question")
    if not _is_missing(row.get("parent_id")):
        raise ValueError("it follows a message that it does not hold")
    return str(row["text"])


def _check_context(row: Row, turns: list[Turn]) -> None:
    """Raises ValueError for a context beside a conversation: nothing says where in it it stands."""
    told = "\n".join(str(turn.content) for turn in turns)
    for name in CONTEXTS:
        if _besides(row, name) not in told:
            raise ValueError(
                f"it has `{name}` beside its turns, without which the question would be another one"
            )


def _up_to_the_question(turns: list[Turn]) -> list[Turn]:
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns:
        raise ValueError("the conversation has no user turn")
    return turns


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """The turns behind the row's own system prompt, which may stand in them already."""
    prompts: list[str] = []
    for name in SYSTEMS:
        text = _besides(row, name)
        if text and text not in prompts:
            prompts.append(text)
    if not prompts:
        return turns

    first = turns[0]
    has_own = first.role == "system"
    if len(prompts) > 1 or (has_own and str(first.content).strip() != prompts[0]):
        raise ValueError("it has two system prompts that differ")
    return turns if has_own else [Turn("system", prompts[0]), *turns]


# --- conversations --------------------------------------------------------------------------------


def _turns(value: object) -> list[Turn]:
    """The turns of a list of them, or of a dictionary of columns."""
    if isinstance(value, Mapping):
        value = _by_turn(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(_NO_TURNS)

    turns: list[Turn] = []
    for number, turn in enumerate(value):
        if isinstance(turn, str):
            role = "user" if number % 2 == 0 else "assistant"
            turns.append(Turn(role, turn))
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            question, answer = turn
            turns += _pair(question, answer)
        elif isinstance(turn, Mapping):
            turns += _turns_of_object(turn)
        else:
            raise ValueError(_NO_TURNS)
    return turns


def _turns_of_object(turn: Row) -> list[Turn]:
    """One turn, or the two of a question with its answer."""
    role = _first(turn, "role", "from", "speaker", "author")
    if role is None:
        for question, answer in PAIRS:
            if question in turn and answer in turn:
                return _pair(turn[question], turn[answer])
    if not isinstance(role, str):
        raise ValueError(_NO_TURNS)
    return [Turn(_known_role(role), _content_of_turn(turn))]


def _known_role(role: str) -> str:
    name = role.strip().lower()
    if name.startswith(_VERSIONED_ASSISTANTS):
        return "assistant"
    if name not in ROLES:
        raise ValueError(f"a turn is from {role!r:.40}; roles are {_KNOWN_ROLES}")
    return ROLES[name]


def _content_of_turn(turn: Row) -> str | ValueError:
    unseen = _unseen(turn)
    if unseen is not None:
        return ValueError(f"a turn has `{unseen}`, which no text can show")
    for calls in CALLS:
        if turn.get(calls):
            return ValueError("a turn calls tools, which no text can show")
    return _content(_first(turn, "content", "value", "text", "message"))


def _content(content: object) -> str | ValueError:
    """Its text, or why it is none: the last answer, which is not asked, may be anything."""
    try:
        return content_text(content)
    except ValueError as error:
        return error


def _pair(question: object, answer: object) -> list[Turn]:
    return [Turn("user", _content(question)), Turn("assistant", _content(answer))]


def _by_turn(value: Row) -> list[dict[str, object]]:
    """One dictionary for each turn, of a dictionary of columns."""
    columns: dict[str, Sequence[object]] = {}
    for name, column in value.items():
        if not isinstance(column, (list, tuple)):
            raise ValueError(_NO_TURNS)
        columns[name] = column
    if not columns:
        raise ValueError(_NO_TURNS)

    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise ValueError("the columns of its turns are of different lengths")
    turns = []
    for number in range(lengths.pop()):
        turn = {name: column[number] for name, column in columns.items()}
        turns.append(turn)
    return turns


# --- questions ------------------------------------------------------------------------------------


class _Fields(NamedTuple):
    """What a row has in QUESTIONS."""

    texts: dict[str, str]
    turns: Sequence[object] | None  # a list in one of them
    odd: str  # the first one that holds neither; empty: there is none


def _question(row: Row) -> list[Turn]:
    """The question with what belongs to it, after the earlier turns of `history`."""
    fields = _question_fields(row)
    if fields.turns is not None:
        return _asked_in_list(fields.turns, fields.texts)
    if not fields.texts:
        raise ValueError(f"`{fields.odd}` is no text")

    texts = fields.texts
    definition = _besides(row, "definition")  # of a task, of which `input` is an instance
    has_input = "input" in texts or "inputs" in texts
    if definition and has_input and "instruction" not in texts:
        texts["instruction"] = definition
    name, main = _main(texts)
    transcript = _transcript(main)
    if transcript is not None:
        return _up_to_the_question(_turns(transcript))

    asked = Turn("user", _whole_question(row, name, main))
    history = row.get("history")
    earlier = _turns(history) if history else []
    return [*earlier, asked]


def _question_fields(row: Row) -> _Fields:
    texts: dict[str, str] = {}
    turns: Sequence[object] | None = None
    odd = ""
    for name in QUESTIONS:
        value = row.get(name)
        if isinstance(value, Mapping) and "text" in value:  # the root of a tree
            value = value["text"]

        is_beside_a_text = name == "input" and bool(texts)
        if isinstance(value, str):
            texts[name] = value
        elif isinstance(value, (list, tuple)) and value and not is_beside_a_text:
            turns = value
        elif not _is_missing(value) and not odd and not texts:
            odd = name
    return _Fields(texts, turns, odd)


def _asked_in_list(listed: Sequence[object], texts: Mapping[str, str]) -> list[Turn]:
    """The turns of a question field that holds a list; texts in other fields must stand in it."""
    if len(listed) > 1 and _are_texts(listed):
        raise ValueError("it holds several questions without their answers")

    turns = _up_to_the_question(_turns(listed))
    asked = str(turns[-1].content)
    for text in texts.values():
        if text not in asked:
            raise ValueError("it asks twice: a conversation and a text differ")
    return turns


def _main(texts: Mapping[str, str]) -> tuple[str, str]:
    """The field that asks, and its text.

    An instruction goes before the question that it is about. Raises ValueError for a row with two
    questions.
    """
    asking = _without_repeats(_asking(texts))
    names = list(asking)
    if len(names) == 1:
        return names[0], asking[names[0]]
    if len(names) == 2 and "instruction" in names:
        instruction = asking.pop("instruction").strip()
        question = "".join(asking.values()).strip()
        return "instruction", f"{instruction}\n{question}"
    raise ValueError(f"it asks twice: `{names[0]}` and `{names[1]}` differ")


def _asking(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts that may ask: not `input`, nor blank ones, unless there are no others."""
    asking = {name: text for name, text in texts.items() if name != "input"}
    if not asking:
        return dict(texts)
    told = {name: text for name, text in asking.items() if text.strip()}
    return told if told else asking


def _without_repeats(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts that do not stand in another one."""
    kept = dict(texts)
    for name, text in texts.items():
        others = [other for key, other in kept.items() if key != name]
        if _stands_in(text.strip(), others):
            del kept[name]
    return kept


def _stands_in(part: str, texts: Iterable[str]) -> bool:
    return any(part in text for text in texts)


def _whole_question(row: Row, name: str, main: str) -> str:
    """The text that asks, and what belongs to it below; `name` is the field of the text."""
    parts = [main.strip()]
    for besides in BESIDES:
        if besides == name:
            continue
        text = _besides(row, besides)
        is_told = besides != "input" and len(text) >= _LONG and text in main
        if text and not is_told:
            parts.append(text)
    parts += _choices(row)

    whole = "\n".join(part for part in parts if part)
    is_main_alone = whole == parts[0]
    if is_main_alone and name != "instruction":
        return main
    return whole


def _besides(row: Row, name: str) -> str:
    """What a row has beside its question and belongs to it, as text."""
    value = row.get(name)
    if name == "input" and (_is_missing(value) or value == ""):
        value = _first_instance(row)
    if isinstance(value, Mapping) and value and _are_texts(value.values()):
        value = [f"{key}. {text}" for key, text in value.items()]
    if isinstance(value, (list, tuple)) and _are_texts(value):
        value = "\n".join(value)

    if _is_missing(value) or value is False:
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"`{name}`, which belongs to the question, is no text")
    return str(value).strip()


def _first_instance(row: Row) -> object:
    """The input of a task of self-instruct."""
    instances = row.get("instances")
    if not isinstance(instances, Sequence) or not instances:
        return None
    first = instances[0]
    return first.get("input") if isinstance(first, Mapping) else None


def _choices(row: Row) -> list[str]:
    """Those that have columns of their own: at least the first two letters."""
    for pattern in LETTERED:
        choices = []
        for letter in "ABCDEFGH":
            for spelled in (letter, letter.lower()):
                column = pattern.format(spelled)
                if not _is_missing(row.get(column)):
                    choices.append(f"{letter}. {_besides(row, column)}")

        if len(choices) < 2:
            continue
        if choices[0].startswith("A. ") and choices[1].startswith("B. "):
            return choices
    return []


# --- values of any kind ---------------------------------------------------------------------------


def _is_missing(value: object) -> bool:
    """Nothing: none, not a number (as tables have it), an empty list or dictionary."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    return isinstance(value, (list, tuple, Mapping)) and not value


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _unpacked(value: object) -> object:
    """A list that was written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _first(turn: Row, *names: str) -> object:
    """The first of these fields that holds something."""
    for name in names:
        if turn.get(name) is not None:
            return turn[name]
    return None
