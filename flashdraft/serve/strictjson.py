"""Bytes -> a JSON object, as strictly as a server needs it.

What Python's JSON lets pass or fails at in its own ways is an ApiError of status 400 here: numbers
that are none, names that come twice, half characters, endless nesting. Does not know what the
fields mean.
"""

import json
import math
from typing import Any, NamedTuple

from flashdraft.files import Json
from flashdraft.serve.errors import ApiError
from flashdraft.serve.faults import shown, wrong

__all__ = ["check_inside", "read_object"]

MAX_DEPTH = 64  # of lists and objects in each other; a JSON schema is far below
MAX_MEMBERS = 4096  # of one object
MAX_INSIDE = 16_384  # lists and objects in one field; each takes some microseconds
MAX_DIGITS = 40  # of a whole number


class _Repeated(Exception):
    """The name that an object has twice."""


def read_object(raw: bytes) -> Json:
    """The JSON object that these bytes are. Its numbers may be NaN or infinite."""
    if not raw.strip():
        raise _no_json("the body is empty")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _no_json(f"the body is not UTF-8: byte {error.start} is wrong") from None

    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_int_or_infinity)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _no_json(f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise _no_json(f"the body is nested too deep; {MAX_DEPTH} levels are allowed") from None
    except _Repeated as error:
        name = shown(error.args[0])
        raise ApiError(400, f"an object has {name} twice", code="invalid_json") from None
    if not isinstance(value, dict):
        raise _no_json("the body is no JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> Json:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made

    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise _Repeated(name)
        seen.add(name)
    return made


def _int_or_infinity(digits: str) -> float:
    """Numbers that no field takes are not even read: that would take time, or be an error."""
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _no_json(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


class _Inside(NamedTuple):
    """A list or an object in a field, so many others around it."""

    value: list[object] | Json
    depth: int

    @property
    def parts(self) -> list[Any]:
        """What is in it, names included."""
        if isinstance(self.value, dict):
            return [*self.value, *self.value.values()]
        return self.value


def check_inside(name: str, value: object) -> None:
    """Refuse what Python's JSON lets pass: NaN, infinity, half characters, endless nesting.

    name: the body's field that holds the value.
    """
    if not _is_text(name):
        raise ApiError(400, "a field's name holds half a character", code="invalid_json")

    num_inside = 0
    waiting = [_Inside([value], 0)]
    while waiting:
        inside = waiting.pop()
        if inside.depth > MAX_DEPTH:
            raise wrong(name, f"is nested too deep; {MAX_DEPTH} levels are allowed")
        if isinstance(inside.value, dict) and len(inside.value) > MAX_MEMBERS:
            raise wrong(name, f"has an object of more than {MAX_MEMBERS} members")

        for part in inside.parts:
            if isinstance(part, (list, dict)):
                num_inside += 1
                waiting.append(_Inside(part, inside.depth + 1))
            elif isinstance(part, float) and not math.isfinite(part):
                raise wrong(name, "must be a finite number")
            elif isinstance(part, str) and not _is_text(part):
                raise wrong(name, "holds half a character (a lone surrogate)")
            if num_inside > MAX_INSIDE:
                raise wrong(name, f"has more than {MAX_INSIDE} lists and objects")


def _is_text(text: str) -> bool:
    """Whether UTF-8 can write it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
