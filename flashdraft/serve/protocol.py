"""The bodies that a client sends, and how bytes become one of them.

`read_body` is the one way in: whatever is wrong with the bytes is an ApiError of status 400 that
names the field. Knows JSON and pydantic. Does not know models, tokens or HTTP libraries.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field, GetJsonSchemaHandler, ValidationError, field_validator
from pydantic_core import CoreSchema

from flashdraft.files import Json
from flashdraft.serve.errors import ApiError
from flashdraft.serve.faults import invalid, refused, unknown, wrong
from flashdraft.serve.fields import (
    ANSWERS,
    CHAT_ONLY,
    COMMON,
    COMPLETION_ONLY,
    MAX_STOPS,
    MAX_TOOLS,
    TOKENIZE_ONLY,
    Bias,
    Count,
    Fixed,
    Messages,
    MinP,
    NamedTool,
    Penalty,
    Prompt,
    RepetitionPenalty,
    ResponseFormat,
    Seed,
    Stop,
    StreamOptions,
    Strict,
    StructuredOutputs,
    Temperature,
    TemplateSwitches,
    TokenId,
    Tool,
    ToolChoice,
    TopK,
    TopLogprobs,
    TopP,
)
from flashdraft.serve.strictjson import check_inside, read_object
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


class Body(Strict):
    """The JSON object that a route takes."""

    refused: ClassVar[Mapping[str, Fixed]] = {}  # fields known elsewhere, taken only if harmless

    model: str | None = None  # None: the one that is served

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        """The fields that are refused by name belong to what /openapi.json says."""
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, fixed in cls.refused.items():
            properties[name] = fixed.schema()
        return schema


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
    # vLLM's: requests share a prefix only with those of their key and salt
    cache_salt: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    # about the client; nothing is done with them
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _by_token_id(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token in bias or {}:
            is_id = token.isascii() and token.isdigit() and len(token) < 19
            is_written_once = is_id and str(int(token)) == token  # and not 007
            if not is_written_once:
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

    @property
    def wants_running_usage(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        options = self.stream_options
        return options is not None and bool(options.continuous_usage_stats)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Fixed]] = {**COMMON, **CHAT_ONLY}

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the newer name of the same
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be a call of a tool."""
        return self.tool_choice is not None and self.tool_choice not in ("none", "auto")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, Fixed]] = {**COMMON, **COMPLETION_ONLY}

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=HIGHEST)] | None = None
    best_of: Annotated[int, Field(ge=1, le=ANSWERS)] | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool | None = None  # of a prompt that is text; None: as the tokenizer does


class TokenizeBody(Body):
    """POST /tokenize: `prompt` as it is, or `messages` as the chat template tells them."""

    refused: ClassVar[Mapping[str, Fixed]] = TOKENIZE_ONLY

    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    add_special_tokens: bool | None = None  # of a prompt that is text; None: as the tokenizer does
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


B = TypeVar("B", bound=Body)


def read_body(raw: bytes, kind: type[B]) -> B:
    """The body of that kind that these bytes are.

    Raises ApiError 400: for what is no JSON object, and for a field that is wrong, unknown or
    refused, with its name.
    """
    fields = read_object(raw)
    asked = {}
    for name, value in fields.items():
        check_inside(name, value)
        known = kind.refused.get(name)
        if name in kind.model_fields:
            asked[name] = value
        elif known is None:
            raise unknown(name)
        elif not known.takes(value):
            raise refused(name, known)

    try:
        body = kind.model_validate(asked)
    except ValidationError as error:
        raise invalid(error, asked) from None
    _check_together(body)
    return body


# --- fields together ------------------------------------------------------------------------------


def _check_together(body: Body) -> None:
    """Fields that are right by themselves, and wrong together."""
    if isinstance(body, GenerationBody):
        _check_generation(body)
    if isinstance(body, ChatBody):
        _check_chat(body)
    if isinstance(body, CompletionBody):
        _check_completion(body)
    if isinstance(body, TokenizeBody):
        _check_tokenize(body)


def _check_generation(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options", "needs `stream`: true")
    if body.draft_pieces and not body.stream:
        raise wrong("draft_pieces", "needs `stream`: true")

    outputs = body.structured_outputs
    if outputs is None:
        return
    named = outputs.model_dump(by_alias=True, exclude_none=True)
    if len(named) != 1:
        raise wrong("structured_outputs", "must hold one of json, regex, choice, grammar")
    if body.response_format is not None and body.response_format.type != "text":
        raise wrong("structured_outputs", "and `response_format` cannot be combined")


def _check_chat(body: ChatBody) -> None:
    newer = body.max_completion_tokens
    if body.max_tokens is not None and newer is not None and body.max_tokens != newer:
        raise wrong("max_tokens", "and `max_completion_tokens` must be equal")
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "needs `logprobs`: true")
    if body.parallel_tool_calls is False and body.tools and not body.forces_call:
        told = "cannot be false: a model may call several tools, unless one call is forced"
        raise wrong("parallel_tool_calls", told)

    _check_tools(body)


def _check_tools(body: ChatBody) -> None:
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise wrong("tools", "has two functions of one name")
    for i, tool in enumerate(tools):
        if tool.function.strict and not body.forces_call:
            told = "needs a `tool_choice` that forces a call: others are not bound to a schema"
            raise wrong(f"tools[{i}].function.strict", told)

    choice = body.tool_choice
    if choice is not None and choice != "none" and not tools:
        raise wrong("tool_choice", "needs `tools`")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise wrong("tool_choice", "names a function that is not in `tools`")
    has_form = body.response_format is not None and body.response_format.type != "text"
    if body.forces_call and (has_form or body.structured_outputs is not None):
        raise wrong("tool_choice", "forces a call, and the answer cannot have another form, too")


def _check_completion(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != body.num_answers:
        raise wrong("best_of", "must be equal to `n`: answers are not ranked")
    if body.stream and body.echo and body.logprobs is not None:
        raise wrong("stream", "cannot be true with `echo` and `logprobs` together")
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "must be 1 or more without `echo`")
    if body.add_special_tokens is not None and not _has_text(body.prompt):
        raise wrong("add_special_tokens", "needs a `prompt` that is text")


def _has_text(prompt: Prompt) -> bool:
    """Whether it is text, or one of several that are."""
    if isinstance(prompt, str):
        return True
    return any(isinstance(one, str) for one in prompt)


def _check_tokenize(body: TokenizeBody) -> None:
    is_chat = body.messages is not None
    if is_chat == (body.prompt is not None):
        raise wrong("prompt", "or `messages` must be given, and not both")
    if body.tools and not is_chat:
        raise wrong("tools", "needs `messages`")
    if body.chat_template_kwargs is not None and not is_chat:
        raise wrong("chat_template_kwargs", "needs `messages`")
    if body.add_special_tokens and is_chat:
        raise wrong("add_special_tokens", "needs `prompt`: the chat template adds its own")
