"""What a body says that its text must be. Knows JSON schemas, and no grammar engine."""

from typing import Any, Literal, NamedTuple

from flashdraft.files import Json
from flashdraft.serve.fields import NamedTool, StructuredOutputs, Tool
from flashdraft.serve.protocol import ChatBody, CompletionBody

__all__ = ["Constraint", "constraint_of"]


class Constraint(NamedTuple):
    """What a text must be: `source` is a JSON schema, a regex, texts to choose from or a grammar.

    param: the field that it came in.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: Json | str | list[str]
    param: str


def constraint_of(body: ChatBody | CompletionBody) -> Constraint | None:
    """What the text must be; None: anything."""
    form = body.response_format
    if form is not None and form.type == "json_object":
        return Constraint("json", {"type": "object"}, "response_format")
    if form is not None and form.type == "json_schema":
        return Constraint("json", form.json_schema.definition, "response_format")
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    if isinstance(body, ChatBody) and body.forces_call:
        return Constraint("json", _calls(body), "tool_choice")
    return None


def _structured(outputs: StructuredOutputs) -> Constraint:
    param = "structured_outputs"
    if outputs.json_ is not None:
        return Constraint("json", outputs.json_, param)
    if outputs.regex is not None:
        return Constraint("regex", outputs.regex, param)
    if outputs.choice is not None:
        return Constraint("choice", outputs.choice, param)
    assert outputs.grammar is not None
    return Constraint("grammar", outputs.grammar, param)


def _calls(body: ChatBody) -> Json:
    """The schema of a call that `tool_choice` asks for: of any tool, or of the one that it names.

    A call is {"name": ..., "arguments": {...}}, without a mark around it.
    """
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
    forms = []
    for i, tool in enumerate(tools):
        forms.append(_call(tool, f"#/anyOf/{i}/properties/arguments"))
    return {"anyOf": forms}


def _call(tool: Tool, place: str) -> Json:
    parameters = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": _moved(parameters, place),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: object, place: str) -> Any:
    """A JSON schema, or a part of one, whose root is now at that place of another.

    What has an `$id` stays the root of its own references.
    """
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict) or isinstance(schema.get("$id"), str):
        return schema

    moved = {}
    for name, part in schema.items():
        is_own = name == "$ref" and isinstance(part, str) and part.startswith("#")
        moved[name] = place + part[1:] if is_own else _moved(part, place)
    return moved
