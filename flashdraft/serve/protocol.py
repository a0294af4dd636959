"""The bodies that a client sends, and how bytes become one of them.

`read_body` is the one way in: whatever is wrong with the bytes is an ApiError of status 400 that
names the field. Knows JSON and pydantic. Does not know models, tokens or HTTP libraries.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from flashdraft.serve.errors import ApiError
from flashdraft.serve.fields import (
    ANSWERS,
    CHAT_ONLY,
    COMMON,
    COMPLETION_ONLY,
    MAX_STOPS,
    MAX_TOOLS,
    Bias,
    Count,
    Fixed,
    Message,
    MinP,
    Penalty,
    RepetitionPenalty,
    ResponseFormat,
    Seed,
    Stop,
    StreamOptions,
    Strict,
    StructuredOutputs,
    Temperature,
    TemplateSwitches,
    Text,
    TokenId,
    Tool,
    ToolChoice,
    TopK,
    TopLogprobs,
    TopP,
)
from flashdraft.types import HIGHEST

__all__ = [
    "ApiError",
    "Body",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "GenerationBody",
    "TokenizeBody",
    "read_body",
]

MAX_DEPTH = 64  # of lists and objects in each other; a JSON schema is far below
_PRIVATE = ("messages", "prompt", "tools", "user", "metadata")  # never repeated in an error


class Body(Strict):
    """The JSON object that a route takes."""

    refused: ClassVar[Mapping[str, Fixed]] = {}  # fields known elsewhere, taken only if harmless

    model: str | None = None  # None: the one that is served


class GenerationBody(Body):
    """What a chat and a completion have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[str, Bias] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # this server's own
    drafting: Literal["auto", "on", "off"] | None = None
    draft_pieces: bool | None = None  # streamed chunks say which text was drafted
    # about the client; nothing is done with them
    user: Text | None = None

    @field_validator("logit_bias")
    @classmethod
    def _by_token_id(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or {}:
            is_id = token.isascii() and token.isdigit() and len(token) < 19
            if not is_id:
                raise ValueError("its keys must be token ids")
        return bias

    @property
    def num_answers(self) -> int:
        """How many answers are asked for, to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the text."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Fixed]] = {**COMMON, **CHAT_ONLY}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the newer name of the same
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, Fixed]] = {**COMMON, **COMPLETION_ONLY}

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=HIGHEST)] | None = None
    best_of: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool | None = None  # of a prompt that is text; None: as the tokenizer does


class TokenizeBody(Body):
    """POST /tokenize: `prompt` as it is, or `messages` as the chat template tells them."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    add_special_tokens: bool | None = None  # of a prompt that is text; None: as the tokenizer does
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[TokenId]


B = TypeVar("B", bound=Body)


def read_body(raw: bytes, kind: type[B]) -> B:
    """The body of that kind that these bytes are.

    Raises ApiError 400: for what is no JSON object, and for a field that is wrong, unknown or
    refused, with its name.
    """
    fields = _object(raw)
    for name, value in fields.items():
        _check_inside(name, value)

    asked = {}
    for name, value in fields.items():
        known = kind.refused.get(name)
        if known is None:
            asked[name] = value
        elif not known.takes(value):
            raise _refused(name, known)

    try:
        body = kind.model_validate(asked)
    except ValidationError as error:
        raise _invalid(error, asked) from None
    _check_together(body)
    return body


# --- bytes to an object ---------------------------------------------------------------------------


class _Repeated(Exception):
    """The name that an object has twice."""


def _object(raw: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are. Its numbers may be NaN or infinite."""
    if not raw.strip():
        raise _no_json("the body is empty")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _no_json(f"the body is not UTF-8: byte {error.start} is wrong") from None

    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _no_json(f"the body is not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise _no_json(f"the body is nested too deep; {MAX_DEPTH} levels are allowed") from None
    except _Repeated as error:
        name = _shown(error.args[0])
        raise ApiError(400, f"an object has {name} twice", code="invalid_json") from None
    if not isinstance(value, dict):
        raise _no_json("the body is no JSON object")
    return value


def _parsed(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python reads no whole number of more than 4300 digits
        return json.loads(text, object_pairs_hook=_unique, parse_int=_int_or_infinity)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in made if names.count(name) > 1)
        raise _Repeated(repeated)
    return made


def _int_or_infinity(digits: str) -> float:
    return int(digits) if len(digits) <= 4300 else math.inf


def _no_json(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


class _Inside(NamedTuple):
    """A value in a body, so many lists and objects deep."""

    value: object
    depth: int


def _check_inside(name: str, value: object) -> None:
    """Refuse what Python's JSON lets pass: NaN, infinity, half characters, endless nesting.

    name: the body's field that holds the value.
    """
    if not _is_text(name):
        raise ApiError(400, "a field's name holds half a character", code="invalid_json")

    waiting = [_Inside(value, 1)]
    while waiting:
        inside, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _wrong(name, f"is nested too deep; {MAX_DEPTH} levels are allowed")
        if isinstance(inside, float) and not math.isfinite(inside):
            raise _wrong(name, "must be a finite number")
        if isinstance(inside, str) and not _is_text(inside):
            raise _wrong(name, "holds half a character (a lone surrogate)")
        if isinstance(inside, list):
            waiting += [_Inside(part, depth + 1) for part in inside]
        if isinstance(inside, dict):
            waiting += [_Inside(key, depth) for key in inside]
            waiting += [_Inside(part, depth + 1) for part in inside.values()]


def _is_text(text: str) -> bool:
    """Whether UTF-8 can write it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- what is wrong with an object -----------------------------------------------------------------


def _refused(name: str, known: Fixed) -> ApiError:
    told = f"`{name}` is not supported here"
    if known.values:
        allowed = ", ".join(json.dumps(value) for value in known.values)
        told += f", other than {allowed}"
    if known.hint is not None:
        told += f"; {known.hint}"
    return ApiError(400, told, param=name, code="unsupported_parameter")


def _wrong(param: str, what: str) -> ApiError:
    return ApiError(400, f"`{param}` {what}", param=param, code="invalid_value")


def _invalid(error: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """What a client is told of the fault that `_meant` finds among several."""
    fault = _meant(error.errors(include_url=False, include_context=False), body)
    places = _places(fault["loc"], body)
    name = _name_of(places)
    if fault["type"] == "extra_forbidden":
        told = f"`{name}` is no field of this request"
        return ApiError(400, told, param=name, code="unknown_parameter")
    if fault["type"] == "missing":
        name = ".".join(part for part in (name, str(fault["loc"][-1])) if part)
        told = f"`{name}` is missing"
        return ApiError(400, told, param=name, code="missing_required_parameter")
    if places[0] == "prompt":
        told = "must be text, token ids, or a list of texts or of lists of token ids, none empty"
        return _wrong("prompt", told)

    told = fault["msg"].removeprefix("Value error, ")
    told = f"`{name}`: {told[:1].lower()}{told[1:]}"
    value = fault["input"]
    is_short = value is None or isinstance(value, (bool, int, float, str))
    if is_short and (places[0] not in _PRIVATE or fault["type"] == "literal_error"):
        told += f", got {_shown(value)}"
    return ApiError(400, told, param=name, code="invalid_value")


def _meant(faults: Sequence[ErrorDetails], body: Mapping[str, Any]) -> ErrorDetails:
    """The fault to tell: a field that does not exist, or the one that lies deepest.

    pydantic tells one for every type that a field may have; the deepest is of the type that was
    meant. Of equals, a wrong word is first and a wrong type last.
    """
    order = ("extra_forbidden", "literal_error")

    def weight(fault: ErrorDetails) -> tuple[int, int]:
        depth = len(_places(fault["loc"], body))
        kind = fault["type"]
        if kind == "extra_forbidden" and depth == 1:
            return sys.maxsize, 0
        if kind in order:
            return depth, 1 + order.index(kind)
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
    return name[:200]


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_together(body: Body) -> None:
    """Fields that are right by themselves, and wrong together."""
    if isinstance(body, GenerationBody):
        _check_generation(body)
    if isinstance(body, ChatBody):
        _check_chat(body)
    if isinstance(body, CompletionBody):
        _check_completion(body)
    if isinstance(body, TokenizeBody):
        has_both = body.prompt is not None and body.messages is not None
        has_none = body.prompt is None and body.messages is None
        if has_both or has_none:
            raise _wrong("prompt", "or `messages` must be given, and not both")


def _check_generation(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise _wrong("stream_options", "needs `stream`: true")
    if body.draft_pieces and not body.stream:
        raise _wrong("draft_pieces", "needs `stream`: true")

    outputs = body.structured_outputs
    if outputs is None:
        return
    named = outputs.model_dump(by_alias=True, exclude_none=True)
    if len(named) != 1:
        raise _wrong("structured_outputs", "must hold one of json, regex, choice, grammar")
    if body.response_format is not None and body.response_format.type != "text":
        raise _wrong("structured_outputs", "and `response_format` cannot be combined")


def _check_chat(body: ChatBody) -> None:
    newer = body.max_completion_tokens
    if body.max_tokens is not None and newer is not None and body.max_tokens != newer:
        raise _wrong("max_tokens", "and `max_completion_tokens` must be equal")
    if body.top_logprobs is not None and not body.logprobs:
        raise _wrong("top_logprobs", "needs `logprobs`: true")
    if body.parallel_tool_calls is False and body.tools:
        raise _wrong("parallel_tool_calls", "cannot be false: a model may call several tools")

    needs_tools = body.tool_choice is not None and body.tool_choice != "none"
    if needs_tools and not body.tools:
        raise _wrong("tool_choice", "needs `tools`")


def _check_completion(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != body.num_answers:
        raise _wrong("best_of", "must be equal to `n`: answers are not ranked")
    if body.stream and body.echo and body.logprobs is not None:
        raise _wrong("stream", "cannot be true with `echo` and `logprobs` together")
    if body.max_tokens == 0 and not body.echo:
        raise _wrong("max_tokens", "must be 1 or more without `echo`")
