"""Fields of the bodies: their types, their limits, and which ones are refused by name.

Every number is of its own JSON type: "5" is no number, true is no 1, NaN is none at all. Knows
pydantic. Does not know models, tokens or HTTP.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from flashdraft.files import Json
from flashdraft.types import HIGHEST

__all__ = [
    "ANSWERS",
    "CHAT_ONLY",
    "COMMON",
    "COMPLETION_ONLY",
    "MAX_STOPS",
    "TOKENIZE_ONLY",
    "Fixed",
    "Function",
    "JsonSchema",
    "Messages",
    "NamedTool",
    "Part",
    "Prompt",
    "ResponseFormat",
    "Stop",
    "StreamOptions",
    "Strict",
    "StructuredOutputs",
    "TemplateSwitches",
    "Tool",
    "ToolCall",
    "ToolChoice",
]

ANSWERS = 2**31 - 1  # more are no number of answers; a server allows far fewer
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000  # characters
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]

Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=HIGHEST)]  # 0 and -1 keep all
MinP = Annotated[float, Field(ge=0, lt=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=0, le=HIGHEST)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=HIGHEST)]
Count = Annotated[int, Field(ge=1, le=HIGHEST)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]


class Strict(BaseModel):
    """An object of a body: nothing is converted, no field is passed over."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=False
    )


# --- messages -------------------------------------------------------------------------------------


class Part(Strict):
    """A piece of a message's content; text is all that these models read."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[Part], Field(min_length=1, fail_fast=True)]


class FunctionCall(Strict):
    name: Name
    arguments: str  # JSON as text, as the model wrote it


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class _Message(Strict):
    type: Literal["text"] | None = None  # which lm-eval puts here; it says nothing


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content
    name: None = None


class UserMessage(_Message):
    role: Literal["user"]
    content: Content
    name: None = None


class AssistantMessage(_Message):
    """An earlier answer; what the API put into it besides its text may come back empty."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


# --- prompts --------------------------------------------------------------------------------------


def _is_prompt(value: object) -> bool:
    """Whether it is text or token ids; an empty text may still get a token of its own."""
    return isinstance(value, str) or _are_token_ids(value)


def _are_token_ids(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    for token in value:
        is_id = type(token) is int and 0 <= token <= HIGHEST
        if not is_id:
            return False
    return True


def _checked_prompt(value: Any) -> Any:
    """One prompt, or a list of them. One look at each token: pydantic would try every form."""
    if _is_prompt(value):
        return value
    is_list = isinstance(value, list) and bool(value)
    if is_list and all(_is_prompt(one) for one in value):
        return value
    forms = "text, token ids, or a list of texts and of lists of token ids; no list is empty"
    raise ValueError(f"must be {forms}")


_Prompts = str | list[TokenId] | list[str | list[TokenId]]
Prompt = Annotated[
    str | list[int] | list[str | list[int]],
    PlainValidator(_checked_prompt, json_schema_input_type=_Prompts),
]


# --- tools and formats ----------------------------------------------------------------------------


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: Json | None = None  # a JSON schema
    strict: bool | None = None  # arguments keep to the schema; where a call is forced, they do


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Name


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Name
    description: str | None = None
    definition: Json = Field(alias="schema")
    strict: bool | None = None  # the answer keeps to the schema in any case


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """What the whole answer must be; exactly one of these."""

    json_: Json | str | None = Field(None, alias="json")  # a JSON schema, or one as text
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    grammar: str | None = None  # Lark's syntax


class StreamOptions(Strict):
    include_usage: bool | None = None  # one more chunk at the end, with the usage
    continuous_usage_stats: bool | None = None  # every chunk has the usage so far
    include_obfuscation: Literal[False] | None = None


class TemplateSwitches(Strict):
    """What `chat_template_kwargs` may hold."""

    enable_thinking: bool | None = None


# --- fields that are known and not there ----------------------------------------------------------


class Fixed(NamedTuple):
    """A field that is taken only where it asks for nothing: null, or one of `values`."""

    values: tuple[Any, ...] = ()
    hint: str | None = None  # what to do instead

    def takes(self, value: Any) -> bool:
        """Whether the value asks for nothing. 1 is not true, and 0 is not false."""
        if value is None:
            return True
        for harmless in self.values:
            if value == harmless and isinstance(value, bool) == isinstance(harmless, bool):
                return True
        return False

    def schema(self) -> Json:
        """What /openapi.json says of the field."""
        told = "Not supported." if self.hint is None else f"Not supported: {self.hint}."
        return {"enum": [None, *self.values], "description": told}


_GUIDED = Fixed(hint="removed from this API; use structured_outputs")

COMMON: Mapping[str, Fixed] = {
    # OpenAI's
    "store": Fixed((False,), "nothing is stored"),
    "service_tier": Fixed(("auto", "default"), "there is one tier"),
    "prompt_cache_retention": Fixed(hint="prompts are cached as long as there is room"),
    "prompt_cache_options": Fixed(hint="prompts are cached as long as there is room"),
    "moderation": Fixed(),
    # vLLM's
    "use_beam_search": Fixed((False,)),
    "length_penalty": Fixed((1.0,), "it belongs to beam search"),
    "stop_token_ids": Fixed(([],), "use stop"),
    "include_stop_str_in_output": Fixed((False,)),
    "min_tokens": Fixed((0,), "use ignore_eos with max_tokens"),
    "skip_special_tokens": Fixed((True,)),
    "spaces_between_special_tokens": Fixed((True,)),
    "truncate_prompt_tokens": Fixed(hint="cut the prompt before you send it"),
    "truncation_side": Fixed(hint="cut the prompt before you send it"),
    "prompt_logprobs": Fixed(hint="use /v1/completions with echo and logprobs"),
    "logprob_token_ids": Fixed(),
    "allowed_token_ids": Fixed(hint="use structured_outputs, or logit_bias"),
    "bad_words": Fixed(([],), "use logit_bias"),
    "priority": Fixed((0,), "requests are served in the order of their arrival"),
    "request_id": Fixed(hint="send the header x-request-id"),
    "session_id": Fixed(),
    "return_tokens_as_token_ids": Fixed((False,)),
    "return_token_ids": Fixed((False,)),
    "return_token_offsets": Fixed((False,)),
    "kv_transfer_params": Fixed(),
    "ec_transfer_params": Fixed(),
    "vllm_xargs": Fixed(),
    "repetition_detection": Fixed(),
    "thinking_token_budget": Fixed(hint="use max_tokens"),
    "stream_interval": Fixed(hint="a chunk is what one step gave"),
    "watermarking": Fixed((False,)),
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "guided_decoding_backend": _GUIDED,
    "guided_whitespace_pattern": _GUIDED,
    "structural_tag": Fixed(hint="use structured_outputs"),
}

CHAT_ONLY: Mapping[str, Fixed] = {
    "modalities": Fixed((["text"],), "text is all that these models write"),
    "audio": Fixed(hint="text is all that these models write"),
    "prediction": Fixed(hint="the drafter predicts; --draft prompt_lookup copies from the prompt"),
    "reasoning_effort": Fixed(hint='use chat_template_kwargs: {"enable_thinking": false}'),
    "verbosity": Fixed(("medium",), "ask for it in a message"),
    "web_search_options": Fixed(hint="there is no web search"),
    "functions": Fixed(hint="use tools"),
    "function_call": Fixed(hint="use tool_choice"),
    "include_reasoning": Fixed((True,)),
    "echo": Fixed((False,), "use /v1/completions"),
    "best_of": Fixed((1,), "use n"),
    "add_generation_prompt": Fixed((True,)),
    "continue_final_message": Fixed((False,)),
    "add_special_tokens": Fixed((False,), "the chat template adds them"),
    "documents": Fixed(hint="put them into a message"),
    "chat_template": Fixed(hint="the model's own template is used"),
    "media_io_kwargs": Fixed(),
    "mm_processor_kwargs": Fixed(),
}

COMPLETION_ONLY: Mapping[str, Fixed] = {
    "suffix": Fixed(hint="text is written behind the prompt only"),
    "prompt_embeds": Fixed(hint="use prompt"),
    "messages": Fixed(hint="use /v1/chat/completions"),
    "max_completion_tokens": Fixed(hint="use max_tokens"),
    "top_logprobs": Fixed(hint="use logprobs with a number"),
    "tools": Fixed(([],), "use /v1/chat/completions"),
    "tool_choice": Fixed(("none",), "use /v1/chat/completions"),
    "chat_template_kwargs": Fixed(({},), "use /v1/chat/completions"),
}

TOKENIZE_ONLY: Mapping[str, Fixed] = {
    "add_generation_prompt": Fixed((True,)),
    "continue_final_message": Fixed((False,)),
    "chat_template": Fixed(hint="the model's own template is used"),
    "media_io_kwargs": Fixed(),
    "mm_processor_kwargs": Fixed(),
}
