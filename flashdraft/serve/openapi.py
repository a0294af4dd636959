"""What /openapi.json says of the routes: their bodies, and every status that can occur."""

from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from flashdraft.files import Json
from flashdraft.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

__all__ = ["described", "responses"]

Mode = Literal["validation", "serialization"]
_BODIES: list[tuple[type[BaseModel], Mode]] = [
    (ChatBody, "validation"),
    (CompletionBody, "validation"),
    (DetokenizeBody, "validation"),
    (TokenizeBody, "validation"),
]
_REF = "#/components/schemas/{model}"
_ERROR = "Error"
_TEXTS = ("/v1/chat/completions", "/v1/completions")
_TOKENS = ("/tokenize", "/detokenize")
_OBJECT: Json = {"application/json": {"schema": {"type": "object"}}}
_EVENTS: Json = {"text/event-stream": {"schema": {"type": "string"}}}
_PLAIN: Json = {"text/plain": {"schema": {"type": "string"}}}
_WORDS = {
    200: "The answer",
    400: "Something in the request is wrong; `param` names the field",
    401: "No API key, or a wrong one",
    404: "There is no such model",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Every row and every place in the queue is taken; see Retry-After",
    431: "The headers are too large",
    500: "A fault of the server's",
    503: "The server is loading, draining, or its engine failed",
    504: "The request took too long",
}


def responses(path: str) -> dict[int | str, Json]:
    """Every status that the route can answer with."""
    statuses = [200, 400, 401, 413, 431, 500]
    if path in _TEXTS:
        statuses += [404, 415, 429, 503, 504]
    elif path in _TOKENS:
        statuses += [404, 415, 503]
    elif path.startswith("/v1/models/"):
        statuses += [404]
    elif path in ("/health", "/ready"):
        statuses += [503]

    told: dict[int | str, Json] = {}
    for status in sorted(statuses):
        told[status] = {"description": _WORDS[status], "content": _content(path, status)}
    return told


def _content(path: str, status: int) -> Json:
    if status == 503 and path in ("/health", "/ready"):
        return _OBJECT
    if status != 200:
        error = _REF.format(model=_ERROR)
        return {"application/json": {"schema": {"$ref": error}}}
    if path in _TEXTS:
        return {**_OBJECT, **_EVENTS}
    return _PLAIN if path == "/metrics" else _OBJECT


def described(app: FastAPI) -> None:
    """Have /openapi.json hold the bodies' schemas, which FastAPI does not see: we read them."""
    made_by_fastapi = app.openapi

    def openapi() -> Json:
        made = made_by_fastapi()
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        if _ERROR not in schemas:
            _, bodies = models_json_schema(_BODIES, ref_template=_REF)
            schemas.update(bodies["$defs"])
            schemas[_ERROR] = _error_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            _drop_422(made)
        return made

    app.openapi = openapi  # type: ignore[method-assign]


def _error_schema() -> Json:
    text = {"type": "string"}
    text_or_null = {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": text_or_null, "code": text_or_null}
    inside = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "object", "properties": {"error": inside}, "required": ["error"]}


def _drop_422(made: Json) -> None:
    """FastAPI lists it wherever a path has a parameter; ours are any text."""
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
