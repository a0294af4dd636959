"""A model's calls of tools: JSON text -> a call, while the text is still coming.

Only a function that the request offered can be called; what is no such call stays text. Knows the
two common forms of the object, Hermes' and Llama's. Does not know chat templates or streams.
"""

import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from flashdraft.files import Json

__all__ = ["Call", "ObjectEnd", "could_be_call", "read_call"]

_KEYS = ("name", "type", "function", "parameters", "arguments", "id")  # what a call begins with
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_FIRST_NAME = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"')
_BETWEEN = frozenset("{}[]:,+-.0123456789eEtrufalsn \t\r\n")  # JSON outside of its strings


@dataclass(frozen=True)
class Call:
    """A call of a function, in the order of the answer's calls."""

    index: int
    id: str
    name: str
    arguments: str  # a JSON object

    def to_dict(self) -> Json:
        """As a message holds it; a stream's delta has its `index`, too."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class ObjectEnd:
    """Where a JSON object ends in a text that is still growing, each character looked at once.

    start: the place of its first brace.
    """

    def __init__(self, start: int) -> None:
        self.end: int | None = None  # behind its last brace; None: it has not come
        self.is_broken = False  # no JSON, whatever follows
        self._next = start
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def look(self, text: str) -> None:
        """The text so far, from its beginning."""
        if self.end is not None:
            return
        for at in range(self._next, len(text)):
            if self._in_string:
                self._look_in_string(text[at])
            else:
                self._look_between(text[at])
            if self._depth == 0:
                self.end = at + 1
            if self.is_broken or self.end is not None:
                break
        self._next = len(text)

    def _look_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
        elif char < " ":
            self.is_broken = True

    def _look_between(self, char: str) -> None:
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        elif char not in _BETWEEN:
            self.is_broken = True


def could_be_call(text: str, names: Collection[str]) -> bool:
    """Whether a text that begins with a brace may go on as the object of a call.

    Once False, it stays False for every longer text.
    """
    inside = text[1:].lstrip()
    if inside and inside[0] != '"':
        return False
    key = _FIRST_KEY.match(text)
    if key and key[1] not in _KEYS:
        return False
    name = _FIRST_NAME.match(text)
    return name is None or name[1] in names


def read_call(text: str, names: Collection[str], index: int) -> Call | None:
    """The call that a JSON object is: of a function with one of these names, or None."""
    called = _object(text)
    if called is None:
        return None
    inner = called.get("function")
    if isinstance(inner, dict):
        called = inner

    name = called.get("name", inner)
    arguments = called.get("arguments", called.get("parameters"))
    if isinstance(arguments, str):  # JSON inside of JSON
        arguments = _object(arguments)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None

    written = _written(arguments)
    if written is None:
        return None
    return Call(index, f"call_{secrets.token_hex(12)}", name, written)


def _object(text: str) -> Json | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _written(arguments: Json) -> str | None:
    """As JSON that every reader takes; None: there is none, for NaN and infinity."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which only an escape can write
        return json.dumps(arguments, allow_nan=False)
    return text
