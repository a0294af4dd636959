"""What is refused before a request is looked at: without a key, with headers or a body too large.

Plain ASGI, from outside in: `Keys`, `HeaderLimit`, `BodyLimit`. Paths are compared whole, as the
router compares them; never by a prefix, and never through a URL that a Host header has a part in.
"""

import hashlib
import hmac
from collections.abc import Container, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashdraft.serve.errors import ApiError

__all__ = ["MAX_HEADER_BYTES", "BodyLimit", "HeaderLimit", "Keys", "refusal"]

MAX_HEADER_BYTES = 32 * 1024


def refusal(error: ApiError) -> JSONResponse:
    """The response that says so."""
    return JSONResponse(error.body(), error.status, error.headers)


class Keys:
    """Lets through whoever sends one of the keys as a bearer token, and the paths that need none.

    scope["state"]["owner"] is the digest of the key; rows of different owners share nothing.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[bytes], open_paths: Container[str] = ()
    ) -> None:
        self.app = app
        self._open_paths = open_paths
        self._digests = [hashlib.sha256(key).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        given = _bearer_token(scope)
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if any(matches):  # all of them were compared: time tells nothing
            scope.setdefault("state", {})["owner"] = digest.hex()
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] in self._open_paths:
            await self.app(scope, receive, send)
        else:
            told = "this server needs an API key: send the header `Authorization: Bearer KEY`"
            wanted = {"www-authenticate": "Bearer"}
            error = ApiError(401, told, code="invalid_api_key", headers=wanted)
            await refusal(error)(scope, receive, send)


def _bearer_token(scope: Scope) -> bytes:
    """What the Authorization header carries; empty where there is none, or more than one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) != 1:
        return b""
    scheme, _, token = found[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


class HeaderLimit:
    """Refuses headers of more than MAX_HEADER_BYTES, names and target included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        for name, value in scope["headers"]:
            size += len(name) + len(value)
        if size <= MAX_HEADER_BYTES:
            await self.app(scope, receive, send)
            return

        told = f"the headers have {size} bytes; {MAX_HEADER_BYTES} are allowed"
        error = ApiError(431, told, code="headers_too_large", headers={"connection": "close"})
        await refusal(error)(scope, receive, send)


class BodyLimit:
    """Reads the whole body before the app is asked, and refuses one that is too large.

    Whether a Content-Length says so or not, of one that is too large no more than the limit and one
    network chunk is held; of any other nothing, once it was handed on.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        try:
            replayed = await self._read(scope, receive)
        except ApiError as error:
            await refusal(error)(scope, receive, send)
            return
        if replayed is not None:
            await self.app(scope, replayed, send)

    async def _read(self, scope: Scope, receive: Receive) -> Receive | None:
        """What gives the body to the app; None where the client left. Raises ApiError.

        Whoever waits for the app, maybe for minutes, has no reference to the body.
        """
        if _content_length(scope) > self.max_bytes:
            raise self._too_large()

        body = bytearray()
        is_whole = False
        while not is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            is_whole = not message.get("more_body", False)
            if len(body) > self.max_bytes:
                raise self._too_large()
        return _Replayed(bytes(body), receive)

    def _too_large(self) -> ApiError:
        told = f"the body is larger than {self.max_bytes} bytes"
        return ApiError(413, told, code="body_too_large")


class _Replayed:
    """An ASGI `receive` that gives a body that was read already, then what comes after it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body = self._body
        self._body = None
        return {"type": "http.request", "body": body, "more_body": False}


def _content_length(scope: Scope) -> int:
    """What the header says, or 0; a server refuses what is no number before."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
