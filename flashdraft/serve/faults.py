"""What a client is told of a field that is wrong: which one, what was got, what is allowed.

Knows pydantic's errors. A message may repeat a short value; never what is private in a body.
"""

import json
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flashdraft.serve.errors import ApiError
from flashdraft.serve.fields import Fixed

__all__ = ["invalid", "refused", "shown", "unknown", "wrong"]

MAX_NAME = 200  # characters of a field's name that an error repeats
_PRIVATE = ("messages", "prompt", "tools", "user", "metadata")  # never repeated in an error

_PLAIN_FAULTS = ("extra_forbidden", "literal_error")  # that need no other, the plainest last


def refused(name: str, known: Fixed) -> ApiError:
    """Of a field that is known and not there."""
    told = f"`{name}` is not supported here"
    if known.values:
        allowed = ", ".join(json.dumps(value) for value in known.values)
        told += f", other than {allowed}"
    if known.hint is not None:
        told += f"; {known.hint}"
    return ApiError(400, told, param=name, code="unsupported_parameter")


def unknown(name: str) -> ApiError:
    """Of a field that nobody knows."""
    name = name[:MAX_NAME]
    told = f"`{name}` is no field of this request"
    return ApiError(400, told, param=name, code="unknown_parameter")


def _missing(places: list[int | str], last: str) -> ApiError:
    name = _name_of([*places, last])
    told = f"`{name}` is missing"
    return ApiError(400, told, param=name, code="missing_required_parameter")


def wrong(param: str, what: str) -> ApiError:
    """what: goes on behind the field's name."""
    param = param[:MAX_NAME]
    space = "" if what.startswith(":") else " "
    return ApiError(400, f"`{param}`{space}{what}", param=param, code="invalid_value")


def invalid(error: ValidationError, body: Mapping[str, object]) -> ApiError:
    """What a client is told of the fault that `_meant` finds among several."""
    fault = _meant(error.errors(include_url=False), body)
    kind = fault["type"]
    places = _places(fault["loc"], body)
    name = _name_of(places)
    if kind == "extra_forbidden":
        return unknown(name)
    if kind == "missing":
        return _missing(places, str(fault["loc"][-1]))
    if kind == "union_tag_not_found":
        return _missing(places, fault["ctx"]["discriminator"].strip("'"))
    if kind == "union_tag_invalid":
        tag = fault["ctx"]["discriminator"].strip("'")
        return wrong(_name_of([*places, tag]), f"must be one of {fault['ctx']['expected_tags']}")

    told = fault["msg"].removeprefix("Value error, ")
    told = f": {told[:1].lower()}{told[1:]}"
    value = fault["input"]
    is_short = value is None or isinstance(value, (bool, int, float, str))
    if is_short and (places[0] not in _PRIVATE or kind == "literal_error"):
        told += f", got {shown(value)}"
    return wrong(name, told)


def _meant(faults: Sequence[ErrorDetails], body: Mapping[str, object]) -> ErrorDetails:
    """The fault to tell: the one that lies deepest.

    pydantic tells one for every type that a field may have; the deepest is of the type that was
    meant. Of equals, a wrong word is first and a wrong type last.
    """

    def weight(fault: ErrorDetails) -> tuple[int, int]:
        depth = len(_places(fault["loc"], body))
        kind = fault["type"]
        if kind in _PLAIN_FAULTS:
            return depth, 1 + _PLAIN_FAULTS.index(kind)
        return depth, -1 if kind.endswith("_type") else 0

    return max(faults, key=weight)


def _places(loc: tuple[int | str, ...], body: object) -> list[int | str]:
    """The names and numbers that lead to a value.

    pydantic's also hold the type that it tried.
    """
    places: list[int | str] = []
    inside = body
    for part in loc:
        is_key = isinstance(inside, dict) and part in inside
        is_place = isinstance(inside, list) and isinstance(part, int) and part < len(inside)
        if is_key or is_place:
            places.append(part)
            inside = inside[part]  # type: ignore[index]
    return places


def _name_of(places: list[int | str]) -> str:
    """Like messages[0].content"""
    name = ""
    for place in places:
        if isinstance(place, int):
            name += f"[{place}]"
        else:
            name += f".{place}" if name else place
    return name[:MAX_NAME]


def shown(value: object) -> str:
    """The beginning of its JSON."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
