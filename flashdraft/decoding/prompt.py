"""What a prompt is: text, a conversation or token ids; and how a chat template tells a conversation.

Knows the types that people hand over, and a tokenizer's `apply_chat_template`. Does not know models, files or data sets.
What is no prompt is refused by name, and so is a conversation of which a template would drop something.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from flashdraft.errors import InvalidPrompt, first_line
from flashdraft.types import as_number

__all__ = ["Asked", "as_asked", "content_text", "is_one", "rendered"]

Turn = dict[str, Any]
Asked = str | list[Turn] | list[int]

_FORMS = "give text, a conversation (a list of {role, content}), or a list of token ids"
_TEXT_PARTS = ("text", "input_text", "output_text")
_TEMPLATE_ERRORS = (
    "TemplateSyntaxError",
    "TemplateAssertionError",
    "SecurityError",
)  # jinja's, whatever is asked
_PROBE = " FlashDraftProbe"  # what is added to a turn to see whether the template reads it
# types that hold no prompt, though one can be made of them, and how
_NEARLY: list[tuple[Any, str]] = [
    ((bytes, bytearray, memoryview), "decode it: prompt.decode()"),
    (PurePath, "give what the file says: path.read_text()"),
    (io.IOBase, "give what the file says: file.read()"),
    ((set, frozenset), "a set has no order; give a list"),
]


def is_one(prompts: object) -> bool:
    """Whether this is one prompt (or something that is none), not several."""
    if isinstance(prompts, (str, Mapping)) or any(isinstance(prompts, kind) for kind, _ in _NEARLY):
        return True

    if _is_array(prompts):
        if prompts.ndim != 1:  # type: ignore[attr-defined]
            return True
        prompts = prompts.tolist()  # type: ignore[attr-defined]
    if not isinstance(prompts, Sequence):
        return not isinstance(prompts, Iterable)

    first = as_number(prompts[0]) if len(prompts) else None
    return isinstance(first, (int, float, Mapping))


def as_asked(prompt: Any) -> Asked:
    """The prompt as text, as turns whose content is text, or as token ids. Raises InvalidPrompt for what is none of them."""
    prompt = as_number(prompt)
    if _is_array(prompt):
        if prompt.ndim != 1:
            got = f"an array of {prompt.ndim} dimensions is not a prompt"
            raise InvalidPrompt(got, hint="give one row of token ids, without padding: ids[0]")
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        if not prompt:
            raise _empty()
        return prompt
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping)) or not isinstance(
        prompt, Sequence
    ):
        raise _no_prompt(prompt)
    if not len(prompt):
        raise _empty()

    parts = [as_number(part) for part in prompt]
    if isinstance(parts[0], (int, float)):
        return _ids(parts)
    if all(isinstance(part, Mapping) for part in parts):
        return [_turn(part, number) for number, part in enumerate(parts, 1)]
    raise _no_prompt(prompt)


def content_text(content: Any) -> str:
    """A turn's content as text: parts of text are joined by line breaks. Raises ValueError for what is no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"a turn's content is no text but {_type_name(content)}")

    texts = []
    for part in content:
        text = part
        if isinstance(part, Mapping):
            kind = part.get("type", "text")
            if kind not in _TEXT_PARTS:
                raise ValueError(f"a turn's content is no text: it has a part of type {kind!r}")
            text = part.get("text")
        if not isinstance(text, str):
            raise ValueError("a turn's content is no text: it has a part without a text")
        texts.append(text)
    return "\n".join(texts)


def rendered(tokenizer: Any, name: str, turns: Sequence[Turn], **switch: Any) -> str:
    """The conversation as the chat template of the target called `name` tells it, up to where the answer begins.

    turns: their content is text; templates that want parts get parts. Raises InvalidPrompt where the template refuses the
    conversation, or would drop something of it without a word.
    """
    template = str(tokenizer.chat_template)
    if "tool_calls" not in template and any(turn.get("tool_calls") for turn in turns):
        got = f"the chat template of `{name}` has no `tool_calls`, which a turn has"
        raise InvalidPrompt(got, hint="leave them out, or tell them in the turn's content")
    if "developer" not in template:
        turns = [
            turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns
        ]

    def told(turns: Sequence[Turn]) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, **switch}
        try:
            return str(tokenizer.apply_chat_template(turns, **options))
        except Exception as error:  # a template raises what it likes
            raise _refusal(error, tokenizer, name) from None

    turns, text = _in_its_form(turns, told)
    for number, turn in enumerate(turns):
        if turn["role"] not in ("user", "assistant") and _is_dropped(turns, number, text, told):
            got = f"the chat template of `{name}` drops turns of role `{turn['role']}`"
            raise InvalidPrompt(got, hint="leave that turn out, or put its text into a user's turn")
    return text


def _refusal(error: Exception, tokenizer: Any, name: str) -> InvalidPrompt:
    """Why a template tells nothing: it is missing or damaged, or it refuses this conversation."""
    cause = first_line(error)
    if isinstance(error, ImportError):
        return InvalidPrompt(
            f"the chat template of `{name}` cannot run: {cause}", hint="pip install jinja2"
        )
    if isinstance(tokenizer.chat_template, Mapping) and "default" not in tokenizer.chat_template:
        found = ", ".join(map(str, tokenizer.chat_template))
        hint = "call the one that is meant `default` in its tokenizer_config.json"
        return InvalidPrompt(
            f"`{name}` has several chat templates ({found}), and none is called default", hint=hint
        )
    if type(error).__name__ in _TEMPLATE_ERRORS:
        hint = "fetch the model's files again, or mend its chat_template.jinja (or tokenizer_config.json)"
        return InvalidPrompt(f"the chat template of `{name}` is damaged: {cause}", hint=hint)
    refused = f"the chat template of `{name}` refuses the conversation: {cause}"
    return InvalidPrompt(refused, hint="give turns of roles that it knows, in its order")


def _in_its_form(turns: Sequence[Turn], told: Any) -> tuple[Sequence[Turn], str]:
    """The turns with their content as the template reads it, text or parts, and the text that it makes of them."""
    last = str(turns[-1]["content"]).strip()
    in_parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    refusal = None
    try:
        text = told(turns)
        if last in text:
            return turns, text
    except InvalidPrompt as error:
        refusal = error

    with suppress(
        InvalidPrompt
    ):  # a template of parts passes over the characters of a text, or cannot read them
        text_of_parts = told(in_parts)
        if last and last in text_of_parts:
            return in_parts, text_of_parts
    if refusal is not None:
        raise refusal
    return turns, text


def _is_dropped(turns: Sequence[Turn], number: int, text: str, told: Any) -> bool:
    """Whether the template makes the same text of it when the turn of this number says something else."""
    content = turns[number]["content"]
    other = (
        content + _PROBE
        if isinstance(content, str)
        else [*content, {"type": "text", "text": _PROBE}]
    )
    changed = [*turns[:number], turns[number] | {"content": other}, *turns[number + 1 :]]
    try:
        return bool(told(changed) == text)
    except InvalidPrompt:  # it looked at it
        return False


def _ids(parts: list[Any]) -> list[int]:
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int):
            raise InvalidPrompt(f"{_shown(part)} is not a token id", hint="token ids are integers")
    return parts


def _turn(turn: Mapping[str, Any], number: int) -> Turn:
    if "role" not in turn or not ("content" in turn or "tool_calls" in turn):
        raise _no_prompt([turn])
    if not isinstance(turn["role"], str):
        raise InvalidPrompt(f"turn {number}: its role is {_shown(turn['role'])}", hint=_FORMS)

    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    try:
        return {**turn, "content": content_text(content)}
    except ValueError as error:
        hint = "a text model reads text: give a string, or parts of type text"
        raise InvalidPrompt(f"turn {number}: {error}", hint=hint) from None


def _is_array(value: object) -> bool:
    """An array of numpy, a tensor, a column of pandas: anything with dimensions that gives out a list."""
    return hasattr(value, "ndim") and hasattr(value, "tolist") and not isinstance(value, memoryview)


def _empty() -> InvalidPrompt:
    return InvalidPrompt("the prompt is empty", hint="give at least one token of text")


def _no_prompt(value: Any) -> InvalidPrompt:
    hint = next((hint for kind, hint in _NEARLY if isinstance(value, kind)), _FORMS)
    if isinstance(value, Mapping):
        known = [
            name for name in ("input_ids", "messages", "conversations", "prompt") if name in value
        ]
        hint = f"give its `{known[0]}`" if known else "a conversation is a list of turns: [turn]"
    return InvalidPrompt(f"{_shown(value)} ({_type_name(value)}) is not a prompt", hint=hint)


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split()):.60}"


def _type_name(value: object) -> str:
    return "None" if value is None else type(value).__name__
