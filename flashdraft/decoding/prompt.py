"""What a prompt is: text, a conversation or token ids; and how a chat template tells one.

Knows the types that people hand over, and a tokenizer's `apply_chat_template`. Does not know
models, files or data sets. What is no prompt is refused by name, and so is a conversation of which
a template would drop something. Nobody but the template writes control tokens.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple, Protocol, TypeGuard
from weakref import WeakKeyDictionary

from flashdraft.decoding import ending
from flashdraft.decoding.spelling import Marks, Spelling
from flashdraft.errors import InvalidPrompt, first_line
from flashdraft.types import as_number

__all__ = ["Asked", "as_asked", "check_text", "content_text", "encoded", "is_one", "told"]

Turn = dict[str, Any]
Change = Callable[[str], str]
Asked = str | list[Turn] | list[int]

_FORMS = "give text, a conversation (a list of {role, content}), or a list of token ids"
_TEXT_PARTS = ("text", "input_text", "output_text")
_BYTES = (bytes, bytearray, memoryview)
# types that hold no prompt, though one can be made of them, and how
_NEARLY: list[tuple[tuple[type, ...], str]] = [
    (_BYTES, "decode it: prompt.decode()"),
    ((PurePath,), "give what the file says: path.read_text()"),
    ((io.IOBase,), "give what the file says: file.read()"),
    ((set, frozenset), "a set has no order; give a list"),
]
_PROMPT_FIELDS = ("input_ids", "messages", "conversations", "prompt")  # of a row or an encoding
# jinja's, of a template that is broken whatever is asked
_TEMPLATE_ERRORS = ("TemplateSyntaxError", "TemplateAssertionError", "SecurityError")
_ROLE = re.compile(r"[\w .-]+")  # templates write it between their own marks
_PROBE = " FlashDraftProbe"  # what is added to a turn to see whether the template reads it


class Tokenizer(ending.Tokenizer, Protocol):
    """What is called of a tokenizer here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class _Array(Protocol):
    """An array of numpy, a tensor, a column of pandas: what has dimensions and gives out a list."""

    ndim: int

    def tolist(self) -> list[object]: ...


def is_one(prompts: object) -> bool:
    """Whether this is one prompt (or something that is none), not several."""
    if isinstance(prompts, (str, Mapping)) or _how_to_read(prompts) is not None:
        return True

    if _is_array(prompts):
        if prompts.ndim != 1:
            return True
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        return not isinstance(prompts, Iterable)
    if not len(prompts):
        return False
    first = as_number(prompts[0])
    return isinstance(first, (int, float, Mapping))


def as_asked(prompt: object) -> Asked:
    """The prompt as text, as turns whose content is text, or as token ids.

    Raises InvalidPrompt for what is none of them.
    """
    prompt = as_number(prompt)
    if _is_array(prompt):
        if prompt.ndim != 1:
            got = f"an array of {prompt.ndim} dimensions is not a prompt"
            raise InvalidPrompt(got, hint="give one row of token ids, without padding: ids[0]")
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (*_BYTES, Mapping)):
        raise _no_prompt(prompt)
    if not len(prompt):
        raise InvalidPrompt("the prompt is empty", hint="give at least one token of text")
    if isinstance(prompt, str):
        return prompt

    parts = [as_number(part) for part in prompt]
    if isinstance(parts[0], (int, float)):
        return _token_ids(parts)
    if all(isinstance(part, Mapping) for part in parts):
        return [_turn(part, number) for number, part in enumerate(parts, 1)]
    raise _no_prompt(prompt)


def _token_ids(parts: Sequence[object]) -> list[int]:
    ids = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int):
            raise InvalidPrompt(f"{_shown(part)} is not a token id", hint="token ids are integers")
        ids.append(part)
    return ids


def _turn(turn: Mapping[str, object], number: int) -> Turn:
    """A turn whose content is text; `number` is its place, from 1."""
    has_content = "content" in turn or "tool_calls" in turn
    if "role" not in turn or not has_content:
        raise _no_prompt([turn])
    if not isinstance(turn["role"], str) or not _ROLE.fullmatch(turn["role"]):
        raise InvalidPrompt(f"turn {number}: its role is {_shown(turn['role'])}", hint=_FORMS)

    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    try:
        return {**turn, "content": content_text(content)}
    except ValueError as error:
        hint = "a text model reads text: give a string, or parts of type text"
        raise InvalidPrompt(f"turn {number}: {error}", hint=hint) from None


def content_text(content: object) -> str:
    """A turn's content as text: parts of text are joined by line breaks.

    Raises ValueError for what is no text.
    """
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


def _is_array(value: object) -> TypeGuard[_Array]:
    has_list = hasattr(value, "ndim") and hasattr(value, "tolist")
    return has_list and not isinstance(value, memoryview)


def _how_to_read(value: object) -> str | None:
    """The hint for a value of a type in _NEARLY; None for any other."""
    for kinds, hint in _NEARLY:
        if isinstance(value, kinds):
            return hint
    return None


def _no_prompt(value: object) -> InvalidPrompt:
    hint = _how_to_read(value)
    if isinstance(value, Mapping):
        hint = "a conversation is a list of turns: [turn]"
        known = [name for name in _PROMPT_FIELDS if name in value]
        if known:
            hint = f"give its `{known[0]}`"
    if hint is None:
        hint = _FORMS
    return InvalidPrompt(f"{_shown(value)} ({_type_name(value)}) is not a prompt", hint=hint)


def _shown(value: object) -> str:
    """The beginning of its repr, on one line."""
    one_line = " ".join(repr(value).split())
    return f"{one_line:.60}"


def _type_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


# --- chat templates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Template:
    """The chat template of the target called `name`, with the switches that it is given."""

    tokenizer: Tokenizer
    name: str
    source: object  # one text, or several by name
    switches: Mapping[str, object]

    def tell(self, turns: Sequence[Turn]) -> str:
        """The conversation, up to where the answer begins.

        Raises InvalidPrompt where it tells nothing.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.switches
            )
            return str(text)
        except Exception as error:  # a template raises what it likes
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> InvalidPrompt:
        """Why it tells nothing: it is missing or damaged, or it refuses this conversation."""
        cause = first_line(error)
        if isinstance(error, ImportError):
            got = f"the chat template of `{self.name}` cannot run: {cause}"
            return InvalidPrompt(got, hint="pip install jinja2")
        if isinstance(self.source, Mapping) and "default" not in self.source:
            found = ", ".join(str(name) for name in self.source)
            return InvalidPrompt(
                f"`{self.name}` has several chat templates ({found}), and none is called default",
                hint="call the one that is meant `default` in its tokenizer_config.json",
            )
        if type(error).__name__ in _TEMPLATE_ERRORS:
            return InvalidPrompt(
                f"the chat template of `{self.name}` is damaged: {cause}",
                hint="fetch the model's files again, "
                "or mend its chat_template.jinja (or tokenizer_config.json)",
            )
        return InvalidPrompt(
            f"the chat template of `{self.name}` refuses the conversation: {cause}",
            hint="give turns of roles that it knows, in its order",
        )


class _Told(NamedTuple):
    """A conversation as the template reads it, and the text that it makes of it."""

    turns: Sequence[Turn]
    text: str


def encoded(
    tokenizer: Tokenizer, name: str, turns: Sequence[Turn], **switches: object
) -> list[int]:
    """The tokens of the conversation as the chat template of the target called `name` tells it.

    They end where the answer begins. turns: their content is text; templates that want parts get
    parts. switches: the template's, `tools` among them. Raises InvalidPrompt where the template
    refuses the conversation, or would drop something of it without a word.
    """
    template = _Template(tokenizer, name, getattr(tokenizer, "chat_template", None), switches)
    told = _rendered(turns, template)
    check_text(told.text)
    tokens = _spelled(told, template)
    if tokens is not None:
        return tokens
    return tokenizer.encode(told.text, add_special_tokens=False)


def told(tokenizer: Tokenizer, name: str, turns: Sequence[Turn], **switches: object) -> str:
    """The conversation as the chat template tells it, as text. The rest is as in `encoded`."""
    template = _Template(tokenizer, name, getattr(tokenizer, "chat_template", None), switches)
    return _rendered(turns, template).text


def check_text(text: str) -> None:
    """Raises InvalidPrompt for text that is none in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        refused = "the prompt holds half a character (a lone surrogate)"
        raise InvalidPrompt(refused, hint="send text in UTF-8") from None


def _rendered(turns: Sequence[Turn], template: _Template) -> _Told:
    name = template.name
    source = str(template.source)
    has_calls = any(turn.get("tool_calls") for turn in turns)
    if has_calls and "tool_calls" not in source:
        got = f"the chat template of `{name}` has no `tool_calls`, which a turn has"
        raise InvalidPrompt(got, hint="leave them out, or tell them in the turn's content")
    if "developer" not in source:
        turns = [_without_developer(turn) for turn in turns]

    told = _told_in_its_form(turns, template)
    for number, turn in enumerate(told.turns):
        if turn["role"] in ("user", "assistant"):
            continue
        if _is_dropped(number, told, template):
            got = f"the chat template of `{name}` drops turns of role `{turn['role']}`"
            raise InvalidPrompt(got, hint="leave that turn out, or put its text into a user's turn")
    return told


def _without_developer(turn: Turn) -> Turn:
    """The same turn from the role that older templates have for a developer."""
    return turn | {"role": "system"} if turn["role"] == "developer" else turn


def _told_in_its_form(turns: Sequence[Turn], template: _Template) -> _Told:
    """The conversation with its content as the template reads it, text or parts.

    A template of parts passes over the characters of a text, or cannot read them: what the last
    turn says is then missing in what it tells. Raises InvalidPrompt where it refuses both forms.
    """
    last = str(turns[-1]["content"]).strip()
    of_text = _told(turns, template)
    if isinstance(of_text, _Told) and last in of_text.text:
        return of_text

    of_parts = _told([_in_parts(turn) for turn in turns], template)
    if isinstance(of_parts, _Told) and last and last in of_parts.text:
        return of_parts
    if isinstance(of_text, InvalidPrompt):
        raise of_text
    return of_text


def _told(turns: Sequence[Turn], template: _Template) -> _Told | InvalidPrompt:
    try:
        return _Told(turns, template.tell(turns))
    except InvalidPrompt as error:
        return error


def _in_parts(turn: Turn) -> Turn:
    return turn | {"content": [_text_part(turn["content"])]}


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _is_dropped(number: int, told: _Told, template: _Template) -> bool:
    """Whether the template makes the same text where this turn says something else."""
    turns = list(told.turns)
    content = turns[number]["content"]
    other = content + _PROBE if isinstance(content, str) else [*content, _text_part(_PROBE)]
    turns[number] = turns[number] | {"content": other}
    try:
        return template.tell(turns) == told.text
    except InvalidPrompt:  # it looked at it
        return False


# --- control tokens -------------------------------------------------------------------------------

_SPELLINGS: WeakKeyDictionary[Tokenizer, Spelling] = WeakKeyDictionary()


def _spelled(told: _Told, template: _Template) -> list[int] | None:
    """The tokens of what is told, where control tokens are spelled out in the conversation.

    None: there are none in it, and the tokenizer may encode the text itself.
    """
    spelling = _spelling_of(template)
    parts = list(_texts([told.turns, template.switches.get("tools")]))
    together = "\0".join(parts)
    check_text(together)
    holds_any = spelling.holds(together)
    if not holds_any and not any(spelling.may_join(part) for part in parts):
        return None
    if holds_any and not spelling.can_spell:
        refused = f"the conversation holds control tokens of `{template.name}` as text"
        raise InvalidPrompt(refused, hint="leave out what looks like <|im_end|>")
    if not spelling.can_spell:
        return None

    marks = Marks.absent_from(f"{told.text}\0{together}")
    for spared in dict.fromkeys([frozenset[int](), spelling.read]):
        marked = _tell_marked(told.turns, template, _Pen(spelling, marks, spared))
        if isinstance(marked, str) and marks.removed(marked) == told.text:
            return spelling.encode(marked, marks)

    # The template looks for what has marks now. It is told that there is none.
    if not holds_any:
        return None
    if isinstance(marked, InvalidPrompt):
        raise marked
    tokens = spelling.encode(marked, marks)
    if tokens is None:
        tokens = template.tokenizer.encode(marks.removed(marked), add_special_tokens=False)
    return tokens


def _spelling_of(template: _Template) -> Spelling:
    source = str(template.source)
    spelling = _SPELLINGS.get(template.tokenizer)
    if spelling is None or spelling.template != source:
        spelling = Spelling(template.tokenizer, source)
        _SPELLINGS[template.tokenizer] = spelling
    return spelling


class _Pen(NamedTuple):
    """What marks the parts of a conversation.

    spared: control tokens that the template itself reads in what assistants said.
    """

    spelling: Spelling
    marks: Marks
    spared: frozenset[int]

    def mark(self, text: str) -> str:
        return self.spelling.marked(text, self.marks)

    def mark_said(self, text: str) -> str:
        return self.spelling.marked(text, self.marks, self.spared)

    def mark_key(self, text: str) -> str:
        """The name of a field: only where it is no name."""
        return self.mark(text) if self.spelling.holds(text) else text


def _tell_marked(turns: Sequence[Turn], template: _Template, pen: _Pen) -> str | InvalidPrompt:
    """What the template makes of the conversation with its parts marked."""
    marked = []
    for turn in turns:
        fields = _changed(turn, pen.mark, pen.mark_key)
        if turn["role"] == "assistant":
            fields["content"] = _changed(turn["content"], pen.mark_said, pen.mark_key)
        marked.append(fields | {"role": turn["role"]})
    switches = dict(template.switches)
    if "tools" in switches:
        switches["tools"] = _changed(switches["tools"], pen.mark, pen.mark_key)
    told = _told(marked, replace(template, switches=switches))
    return told.text if isinstance(told, _Told) else told


def _texts(value: object) -> Iterator[str]:
    """Every text in it, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(name)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _changed(value: object, of_text: Change, of_name: Change) -> Any:
    """The same with every text in it changed, and every name of a field."""
    if isinstance(value, str):
        return of_text(value)
    if isinstance(value, (list, tuple)):
        return [_changed(inner, of_text, of_name) for inner in value]
    if not isinstance(value, Mapping):
        return value

    changed = {}
    for name, inner in value.items():
        is_kind = name == "type" and isinstance(inner, str)
        own = of_name if is_kind else of_text
        key = of_name(name) if isinstance(name, str) else name
        changed[key] = _changed(inner, own, of_name)
    return changed
