"""A chat's messages -> the tokens of the prompt; and what reads the answer.

Tools are told as the model's template does. Knows OpenAI's messages and tools as plain dicts, and a
model's chat template. Does not know HTTP, bodies or the engine.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flashdraft.decoding.prompt import as_asked, encoded
from flashdraft.decoding.text import TextDecoder
from flashdraft.errors import InvalidParameter, InvalidPrompt
from flashdraft.generate import Model
from flashdraft.serve.turns import MARKS, THINK, THOUGHT, TurnReader

__all__ = ["decoder", "reader", "render"]

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
_TAIL = 16  # tokens at the end of a prompt that hold a mark there, spelled or not
Choice = str | Mapping[str, Any]  # none, auto, required, or {type: function, function: {name}}


def render(
    model: Model,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    tool_choice: Choice = "auto",
    template_kwargs: Mapping[str, object] | None = None,
) -> list[int]:
    """The prompt that makes the model answer these messages.

    messages: OpenAI's, of any role; content is text, parts of text, or null beside tool_calls.
    tools: OpenAI's; told to the model unless tool_choice is none. template_kwargs: only
    `enable_thinking`, where the template has it. Raises InvalidPrompt for messages that the
    template refuses, and InvalidParameter, with `option`, for tools and switches that it has not.
    """
    name = model.target.name
    source = getattr(model.tokenizer, "chat_template", None)
    if not source:
        refused = f"`{name}` has no chat template for messages"
        raise InvalidPrompt(refused, hint="send the prompt as text to /v1/completions")

    switches = _switches(template_kwargs or {}, str(source), name)
    if tools and tool_choice != "none":
        switches["tools"] = [dict(tool) for tool in tools]
    turns = as_asked([_with_arguments(message) for message in messages])
    assert isinstance(turns, list)
    return model.encode(encoded(model.tokenizer, name, turns, **switches))  # type: ignore[arg-type]


def reader(
    model: Model,
    prompt: Sequence[int],
    *,
    tools: Sequence[Tool] | None = None,
    tool_choice: Choice = "auto",
) -> TurnReader:
    """What reads one answer to a prompt that `render` made with the same tools and choice."""
    names = [tool["function"]["name"] for tool in tools or ()]
    if tool_choice == "none":
        names = []
    if tool_choice not in ("none", "auto"):  # the answer is bound to be a call
        return TurnReader(names=names)

    thinks = THOUGHT in str(getattr(model.tokenizer, "chat_template", None))
    tail = model.tokenizer.decode(list(prompt[-_TAIL:]), skip_special_tokens=False)
    opened = thinks and str(tail).rstrip().endswith(THINK)
    return TurnReader(names=names, thinks=thinks, opened=opened)


def decoder(model: Model, stop: Sequence[str] = ()) -> TextDecoder:
    """For the Request of an answer that a `reader` reads: the marks are in its text.

    Some tokenizers have them as special tokens, which are not shown elsewhere.
    """
    return TextDecoder(model.tokenizer, stop, shown=MARKS)


def _switches(given: Mapping[str, object], source: str, name: str) -> dict[str, object]:
    """Those that are given, each of them known here and to the template."""
    switches = {}
    for switch, value in given.items():
        if switch != "enable_thinking":
            got = f"chat_template_kwargs has `{switch}`"
            hint = "enable_thinking is the one switch"
            raise InvalidParameter(got, hint=hint, option="chat_template_kwargs")
        if value is None:
            continue
        if switch not in source:
            got = f"the chat template of `{name}` has no `{switch}`"
            hint = "leave it out of chat_template_kwargs"
            raise InvalidParameter(got, hint=hint, option="chat_template_kwargs")
        switches[switch] = value
    return switches


def _with_arguments(message: Message) -> Message:
    """The same message; the arguments of its calls as the object that their JSON is.

    That is what templates write.
    """
    calls = message.get("tool_calls")
    if not calls:
        return {name: value for name, value in message.items() if name != "tool_calls"}

    told = []
    for call in calls:
        function = dict(call["function"])
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            got = f"the arguments of a call of `{function['name']}` are not JSON"
            raise InvalidPrompt(got, hint="send them back as they came") from None
        told.append({**call, "function": function})
    return {**message, "tool_calls": told}
