"""A chat's messages -> the tokens of the prompt; and what reads the answer.

Tools are told as the model's template does. Knows OpenAI's messages and tools as plain dicts, and a
model's chat template. Does not know HTTP, bodies or the engine.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from flashdraft.decoding.prompt import as_asked, encoded
from flashdraft.decoding.text import TextDecoder
from flashdraft.errors import InvalidParameter, InvalidPrompt
from flashdraft.files import Json, parse_json
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
    source = str(getattr(model.tokenizer, "chat_template", None) or "")
    if not source:
        refused = f"`{name}` has no chat template for messages"
        raise InvalidPrompt(refused, hint="send the prompt as text to /v1/completions")

    switches = _switches(template_kwargs or {}, source, name)
    turns = []
    for message in messages:
        turns.append(_turn(message, source))
    if not tools or tool_choice == "none":
        return _tokens(model, turns, switches)

    if "tools" not in source:
        raise _no_tools(name)
    told = _tokens(model, turns, {**switches, "tools": list(tools)})
    if told == _tokens(model, turns, switches):
        raise _no_tools(name)
    return told


def reader(
    model: Model,
    prompt: Sequence[int],
    *,
    tools: Sequence[Tool] | None = None,
    tool_choice: Choice = "auto",
    is_bound: bool = False,
) -> TurnReader:
    """What reads one answer to a prompt that `render` made with the same tools and choice.

    is_bound: the answer is bound to a grammar, and holds no thoughts.
    """
    names = [tool["function"]["name"] for tool in tools or ()]
    if tool_choice == "none":
        names = []
    if is_bound or tool_choice not in ("none", "auto"):
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


def _no_tools(name: str) -> InvalidParameter:
    got = f"the chat template of `{name}` has no tools"
    hint = "leave `tools` out, or serve a model that was trained to call them"
    return InvalidParameter(got, hint=hint, option="tools")


def _tokens(model: Model, turns: Sequence[Message], switches: Mapping[str, object]) -> list[int]:
    conversation = cast(list[Json], as_asked(turns))
    tokens = encoded(model.tokenizer, model.target.name, conversation, **switches)
    return model.encode(tokens)  # which are checked against the vocabulary


def _turn(message: Message, source: str) -> Message:
    """A message as templates read it: the arguments of its calls are the object of their JSON.

    Thoughts are left out where the template does not ask for them, as it leaves them out itself.
    """
    turn = dict(message)
    if turn.get("content") is None and turn.get("reasoning_content"):
        turn["content"] = ""
    if "reasoning_content" not in source:
        turn.pop("reasoning_content", None)
    calls = turn.pop("tool_calls", None)
    if not calls:
        return turn

    told = []
    for call in calls:
        function = dict(call["function"])
        function["arguments"] = _arguments(function)
        told.append({**call, "function": function})
    return {**turn, "tool_calls": told}


def _arguments(function: Mapping[str, Any]) -> Json:
    try:
        arguments = parse_json(function["arguments"] or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        got = f"the arguments of a call of `{function['name']}` are no JSON object"
        raise InvalidPrompt(got, hint="send them back as they came")
    return arguments
