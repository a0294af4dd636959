"""The chat page at `/`: a few files, served from memory.

Knows the files' bytes, and the headers that keep model text in them harmless. Does not know models,
keys or requests: the page asks the API as any client does.
"""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

__all__ = ["PAGE_PATHS", "page_routes"]

_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/stream.js": ("stream.js", "text/javascript; charset=utf-8"),
    "/tally.js": ("tally.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_PATHS = frozenset(_FILES)  # they hold no secret: who has no key types it into the page

# Scripts and styles are the files above or do not run: not those inside the page, an attribute, or
# a text that became markup, which trusted types forbid besides.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser keeps the files but asks whether they changed: a server of another version may
    # answer at the same address the next minute.
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The page's routes; the files are read once, here."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in _FILES.items():
        content = (_FOLDER / name).read_bytes()
        router.add_api_route(path, _sender(content, media_type), methods=["GET", "HEAD"])
    return router


def _sender(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """A route's function, which answers 304 to a browser that has these bytes."""
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def send(request: Request) -> Response:
        known = request.headers.get("If-None-Match", "")  # tags, each in its quotes
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return send
