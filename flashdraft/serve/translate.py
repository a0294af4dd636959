"""A body becomes what the engine is asked for: prompt tokens, sampling parameters, requests.

Knows models and their tokenizers. Does not know HTTP or the engine's thread. What can be refused
without a pass over the model is refused here, before anything waits for a row.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flashdraft.decoding.grammar import Grammar, grammar_of
from flashdraft.engine import Drafting, Request, check
from flashdraft.errors import FlashDraftError, InvalidParameter, InvalidPrompt
from flashdraft.files import Json
from flashdraft.generate import Model
from flashdraft.pretrained import Tokenizer
from flashdraft.serve.constraint import Constraint, constraint_of
from flashdraft.serve.errors import ApiError, as_api_error
from flashdraft.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from flashdraft.serve.talk import decoder, reader, render
from flashdraft.serve.turns import TurnReader
from flashdraft.types import HIGHEST, SamplingParams, counted_on

__all__ = [
    "Call",
    "Settings",
    "check_model",
    "count_answers",
    "detokenized",
    "tokenized",
    "translate",
]


@dataclass(frozen=True)
class Settings:
    """What a server does where a body says nothing, and the most that it grants."""

    max_tokens: int = 2048  # of an answer, where the context has room for so many
    temperature: float = 1.0
    drafting: Drafting = "auto"
    max_n: int = 16  # answers to one prompt
    max_prompts: int = 64  # prompts of one completion


@dataclass
class Call:
    """A body and what the engine is asked for.

    requests: `num_answers` of the body for every prompt, in their order; each one's index is its
    place. readers: of a chat, one for every answer. prompts: the text of every prompt as `echo`
    gives it back; empty without it.
    """

    body: ChatBody | CompletionBody
    requests: list[Request]
    readers: list[TurnReader] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)

    @property
    def prompt_field(self) -> str:
        """Where the prompt came in, for an error to name."""
        return _prompt_field(self.body)

    @property
    def is_scoring(self) -> bool:
        """Whether nothing new is wanted; the engine's one token is not shown."""
        return self.body.max_tokens == 0


def check_model(asked: str | None, served: Sequence[str]) -> None:
    """Refuse a model that is not served. Nothing is looked up: no file, no network."""
    if asked is None or asked in served:
        return
    names = ", ".join(f"`{name}`" for name in served)
    told = f"the model {json.dumps(asked[:100])} does not exist here; there is {names}"
    raise ApiError(404, told, param="model", code="model_not_found")


def count_answers(body: ChatBody | CompletionBody, settings: Settings) -> int:
    """How many rows the body asks for. Raises ApiError where they are more than are granted."""
    each = body.num_answers
    if each > settings.max_n:
        told = f"`n` is {each}, and this server gives at most {settings.max_n} answers"
        raise ApiError(400, told, param="n", code="invalid_value")

    num_prompts = len(_prompts_of(body)) if isinstance(body, CompletionBody) else 1
    if num_prompts > settings.max_prompts:
        told = f"`prompt` has {num_prompts} prompts; {settings.max_prompts} are allowed"
        raise ApiError(400, told, param="prompt", code="invalid_value")
    return each * num_prompts


def translate(
    body: ChatBody | CompletionBody,
    model: Model,
    settings: Settings,
    *,
    owner: str = "",
) -> Call:
    """What the engine is asked for. Raises ApiError.

    owner: whose the requests are; see Request. Compiling a grammar can take a second.
    """
    count_answers(body, settings)
    constraint = constraint_of(body)
    hook = None
    if constraint is not None:
        hook = _hook(constraint, model.tokenizer)
    try:
        prompts = _read(body, model)
        requests = []
        for prompt in prompts:
            params = _params(body, model, prompt.tokens, settings, hook)
            requests += _answers(prompt.tokens, params, body.num_answers, model)
    except FlashDraftError as error:
        raise as_api_error(error, prompt=_prompt_field(body)) from None

    for index, request in enumerate(requests):
        request.index = index
        # a key's digest has no slash, so that no salt makes one owner of another
        request.owner = owner if body.cache_salt is None else f"{owner}/{body.cache_salt}"
        request.drafting = body.drafting or settings.drafting
    call = Call(body, requests)
    if isinstance(body, ChatBody):
        call.readers = _readers(body, model, requests)
    elif body.echo:
        call.prompts = [_text_of(prompt, model) for prompt in prompts]
    return call


def _prompt_field(body: ChatBody | CompletionBody) -> str:
    return "messages" if isinstance(body, ChatBody) else "prompt"


def _readers(body: ChatBody, model: Model, requests: Sequence[Request]) -> list[TurnReader]:
    """What reads the answers; the requests' decoders show it what it looks for."""
    readers = []
    tools = _tools(body)
    choice = _tool_choice(body)
    is_bound = constraint_of(body) is not None
    for request in requests:
        prompt = request.prompt
        request.decoder = decoder(model, body.stops)
        readers.append(reader(model, prompt, tools=tools, tool_choice=choice, is_bound=is_bound))
    return readers


def tokenized(body: TokenizeBody, model: Model) -> list[int]:
    """The tokens of a prompt or of a conversation. Raises ApiError."""
    source = "messages" if body.messages is not None else "prompt"
    try:
        if body.messages is not None:
            return _conversation(body, model)
        assert body.prompt is not None
        return _tokens(body.prompt, model, body.add_special_tokens)
    except FlashDraftError as error:
        raise as_api_error(error, prompt=source) from None


def detokenized(body: DetokenizeBody, model: Model) -> str:
    """The text of tokens, special ones included. Raises ApiError."""
    try:
        tokens = _known(body.tokens, model)
    except InvalidPrompt as error:
        raise as_api_error(error, prompt="tokens") from None
    return _decoded(tokens, model)


def _hook(constraint: Constraint, tokenizer: Tokenizer) -> Grammar:
    """Compiles it. Raises ApiError where that cannot be done."""
    try:
        return grammar_of(tokenizer, constraint.kind, constraint.source)
    except InvalidParameter as error:
        told = as_api_error(error).message
        raise ApiError(400, told, param=constraint.param, code="invalid_value") from None


# --- prompts --------------------------------------------------------------------------------------


class _Prompt(NamedTuple):
    """A prompt's tokens, and its text where it was given as text."""

    tokens: list[int]
    text: str | None


def _prompts_of(body: CompletionBody) -> Sequence[str | list[int]]:
    """One or several prompts, as a list. Millions of tokens are not copied: the event loop asks."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return given


def _read(body: ChatBody | CompletionBody, model: Model) -> list[_Prompt]:
    if isinstance(body, ChatBody):
        return [_Prompt(_conversation(body, model), None)]

    prompts = []
    for given in _prompts_of(body):
        if isinstance(given, str):
            prompts.append(_Prompt(_tokens(given, model, body.add_special_tokens), given))
        else:
            prompts.append(_Prompt(_known(given, model), None))
    return prompts


def _conversation(body: ChatBody | TokenizeBody, model: Model) -> list[int]:
    """The tokens of the messages as the chat template tells them."""
    messages = []
    for message in body.messages or []:
        messages.append(message.model_dump(exclude_none=True, exclude={"type"}))
    switches = {}
    if body.chat_template_kwargs is not None:
        switches = body.chat_template_kwargs.model_dump(exclude_none=True)
    return render(
        model,
        messages,
        tools=_tools(body),
        tool_choice=_tool_choice(body),
        template_kwargs=switches,
    )


def _tools(body: ChatBody | TokenizeBody) -> list[Json]:
    """As they were sent, without empty fields; their JSON schemas keep their own nulls."""
    tools = []
    for tool in body.tools or []:
        function = {name: value for name, value in tool.function if value is not None}
        tools.append({"type": tool.type, "function": function})
    return tools


def _tool_choice(body: ChatBody | TokenizeBody) -> str | Json:
    choice = body.tool_choice if isinstance(body, ChatBody) else None
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _tokens(text: str, model: Model, add_special_tokens: bool | None) -> list[int]:
    adds = True if add_special_tokens is None else add_special_tokens
    return model.tokenizer.encode(text, add_special_tokens=adds)


def _known(tokens: list[int], model: Model) -> list[int]:
    size = model.target.vocab_size
    for token in tokens:
        if token >= size:
            raise InvalidPrompt(f"token id {token} is outside the vocabulary of {size}")
    return tokens


def _text_of(prompt: _Prompt, model: Model) -> str:
    return _decoded(prompt.tokens, model) if prompt.text is None else prompt.text


def _decoded(tokens: list[int], model: Model) -> str:
    return model.tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


# --- parameters -----------------------------------------------------------------------------------

# fields of the body that SamplingParams has as well
_AS_THEY_COME = (
    "temperature",
    "seed",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _answers(prompt: list[int], params: SamplingParams, count: int, model: Model) -> list[Request]:
    """The requests for so many answers to one prompt; their seeds count on."""
    requests = []
    for number in range(count):
        own = replace(params, seed=counted_on(params.seed, number))
        requests.append(model.request(prompt, own))
    check(model.target, requests[0])
    return requests


def _params(
    body: ChatBody | CompletionBody,
    model: Model,
    prompt: Sequence[int],
    settings: Settings,
    hook: Grammar | None,
) -> SamplingParams:
    """The first answer's parameters. Without a seed in the body it is drawn."""
    given: Json = {
        "temperature": settings.temperature,
        "stop": body.stops,
        "ignore_eos": bool(body.ignore_eos),
        "max_new_tokens": _max_new_tokens(body, model, prompt, settings),
        "logits_processor": hook,
        **_logprobs(body),
    }
    for name in _AS_THEY_COME:
        value = getattr(body, name)
        if value is not None:
            given[name] = value
    if body.seed is None:
        given["seed"] = secrets.randbelow(HIGHEST)
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token): added for token, added in body.logit_bias.items()}
    return SamplingParams(**given)


def _max_new_tokens(
    body: ChatBody | CompletionBody, model: Model, prompt: Sequence[int], settings: Settings
) -> int:
    asked = body.max_tokens
    if isinstance(body, ChatBody) and asked is None:
        asked = body.max_completion_tokens
    if asked is None:
        room = model.target.context_length - len(prompt)
        asked = min(settings.max_tokens, room)
    return max(asked, 1)


def _logprobs(body: ChatBody | CompletionBody) -> Json:
    if isinstance(body, ChatBody):
        return {"logprobs": bool(body.logprobs), "top_logprobs": body.top_logprobs or 0}

    is_wanted = body.logprobs is not None
    return {
        "logprobs": is_wanted,
        "top_logprobs": body.logprobs or 0,
        "prompt_logprobs": is_wanted and bool(body.echo),
    }
