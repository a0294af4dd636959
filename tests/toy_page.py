"""A chat server without a model: the page, and answers that were recorded.

What it streams has the shape of the real server's chunks. What happens is said by the first word of
a question.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from flashdraft.serve.page import page_routes


class Step(NamedTuple):
    """The texts of one target pass's tokens."""

    drafted: list[str]  # accepted
    own: list[str]  # the target's: one, or none at the end of a text
    rejected: Sequence[str] = ()


# The built-in model and its drafter, greedy: the first 60 steps, and all.
TIDES = [
    Step([], ["The"], []),
    Step([], [" sea"], []),
    Step([], [" has"], []),
    Step([], [" tides"], [" a", " floating"]),
    Step([], [" for"], [","]),
    Step([], [" a"], [" the", " ocean"]),
    Step([], [" reason"], [" fundamental"]),
    Step([], ["."], [",", " and", " it"]),
    Step([" It", "'s", " a"], [" natural"], []),
    Step([" phenomenon", " that"], [" occurs"], ["'s"]),
    Step([], [" when"], [" the", " Earth"]),
    Step([" the", " Earth", "'s"], [" mass"], []),
    Step([" is"], [" distributed"], [" the"]),
    Step([], [" uneven"], [" to", " the"]),
    Step([], ["ly"], ["."]),
    Step([], [","], [".", " The", " Earth"]),
    Step([], [" resulting"], [" and", " the", " Earth"]),
    Step([], [" in"], [" as"]),
    Step([], [" high"], [" a", " ripple"]),
    Step([], [" and"], []),
    Step([], [" low"], []),
    Step([], [" tides"], [" currents"]),
    Step([".", " The"], [" reason"], []),
    Step([], [" lies"], [" is", " a", " deep"]),
    Step([], [" in"], [" to", " the"]),
    Step([" the"], [" Earth"], []),
    Step(["'s"], [" rotation"], []),
    Step([], [" and"], ["'s"]),
    Step([" the"], [" Moon"], []),
    Step([], ["'s"], []),
    Step([], [" orbit"], []),
    Step([], [" around"], [".", "\n", "\n", "\n", " The"]),
    Step([" the"], [" Sun"], []),
    Step(["."], [" The"], ["\n", "\n", "The"]),
    Step([], [" Moon"], [" Earth", "'s"]),
    Step(["'s"], [" orbit"], []),
    Step([" is"], [" elliptical"], []),
    Step([","], [" with"], [" which", " means"]),
    Step([], [" a"], [" the", " moon"]),
    Step([], [" slight"], [" surface"]),
    Step([], [" tilt"], [" distance"]),
    Step([], [","], []),
    Step([], [" but"], []),
    Step([], [" the"], []),
    Step([], [" Earth"], []),
    Step([], ["'s"], []),
    Step([], [" rotation"], []),
    Step([], [" is"], []),
    Step([], [" also"], []),
    Step([], [" tilted"], []),
    Step([], [" at"], []),
    Step([], [" approximately"], []),
    Step([], [" "], []),
    Step([], ["2"], []),
    Step([], ["3"], ["0"]),
    Step([], ["."], []),
    Step([], ["5"], []),
    Step([], [" degrees"], []),
    Step([], ["."], []),
    Step([], [" This"], []),
]
REVERSE = [
    Step([], ["```"], []),
    Step(["python", "\n", "def", " reverse", "_"], ["string"], []),
    Step(["(", "input", "_", "str", "):"], ["\n   "], []),
    Step([" return", " input", "_", "str"], ["[::-"], []),
    Step(["1", "]", "\n", "```", "\n"], ["\n"], []),
    Step(["This", " function", " uses"], [" slicing"], [" Python", "'s"]),
    Step([" to"], [" reverse"], [" create", " a"]),
    Step([" the", " input", " string", "."], [" The"], []),
    Step([" `", "[::-", "1", "]"], ["`"], []),
    Step([" syntax"], [" in"], [" is", " a", " Python", " syntax"]),
    Step([" Python"], [" is"], [" Python", " idiom", " that"]),
    Step([" a"], [" slice"], [" syntax", " that"]),
    Step([" that"], [" returns"], [" revers", "es", " a"]),
    Step([" a", " reversed"], [" copy"], [" string", ".", "\n"]),
    Step([" of", " the"], [" string"], [" input", " string", "."]),
    Step([".", ""], [], [".", " The", " `"]),
]
LONG_WORD = "x" * 100_000
HOSTILE = [
    Step(["<img src=x onerror=\"document.title='run'\">"], ["<b>"]),
    Step(["<script>document.title='run'</script>"], ["</script>"], ["<svg onload=alert(1)>"]),
    Step(
        ["\u202eright to left\u202c", "\u2066isolate"], ["\n\n\u200b\u200d\ufeff"], ["\u202e" * 9]
    ),
    Step(["Z\u0300\u0301\u0302\u0303" + "\u0334\u0335\u0336\u0337\u030d\u030e" * 40], [" a"]),
    Step(["שלום עולם\n", "مرحبا\n", "\x00\x07\x1b[31m"], ["\n" * 40], [" \n\t" * 2000]),
    Step(["javascript:alert(1) ", "{{7*7}} ${7*7} &lt;b&gt;"], ["👩‍👩‍👧‍👦"], ["<b>"] * 500),
    Step([LONG_WORD], ["."], [LONG_WORD]),
]
HOSTILE_NAME = '<img src=x onerror="document.title=1">\u202eledom'


class ToyChat:
    """What the server is told to do, and what it was asked."""

    def __init__(self) -> None:
        self.key = ""  # that it wants; none if empty
        self.name = "smollm2-135m"
        self.bodies: list[dict[str, Any]] = []  # of chats, oldest first
        self.num_gone = 0  # streams that the client left
        self.seconds = 0.0  # that a target pass takes
        self.app = FastAPI()
        self.app.include_router(page_routes())
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    async def models(self, request: Request) -> Response:
        if not self._is_allowed(request):
            return refusal(401, "the API key is missing or wrong")
        return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model"}]})

    async def chat(self, request: Request) -> Response:
        if not self._is_allowed(request):
            return refusal(401, "the API key is missing or wrong")
        body = await request.json()
        self.bodies.append(body)
        word = body["messages"][-1]["content"].split()[0]
        if word == "busy":
            return refusal(503, "the queue is full", {"Retry-After": "7"})
        if word == "long":
            return refusal(400, "the prompt has 9000 tokens, 8192 are allowed")
        if word == "proxy":
            return Response("<h1>Bad gateway</h1>", 502, media_type="text/html")
        events = self._events(word, body)
        pieces = cut(events) if word == "cut" else events
        return StreamingResponse(pieces, media_type="text/event-stream")

    def _is_allowed(self, request: Request) -> bool:
        return not self.key or request.headers.get("Authorization") == f"Bearer {self.key}"

    async def _events(self, word: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield event(chunk({"role": "assistant", "content": ""}))
        if word == "held":
            for part in held():
                yield event(part)
            yield b"data: [DONE]\n\n"
            return
        steps = steps_for(word, body["drafting"])
        try:
            for number, step in enumerate(steps):
                await asyncio.sleep(self.seconds)
                yield event(chunk_of(step))
                if word == "drop" and number == 8:
                    await asyncio.sleep(0.1)  # a browser throws away what it has not read by then
                    raise ConnectionResetError
                if word == "fault" and number == 8:
                    yield event({"error": {"message": "the engine stopped", "code": 500}})
                    return
        except asyncio.CancelledError:
            self.num_gone += 1
            raise
        yield event(chunk({}, "stop"))
        num_tokens = sum(len(step.drafted) + len(step.own) for step in steps)
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": num_tokens,
            "total_tokens": num_tokens + 9,
        }
        yield event({**chunk({}), "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"


def steps_for(word: str, drafting: str) -> list[Step]:
    steps = REVERSE if word == "Write" else TIDES
    if word == "hostile":
        return HOSTILE
    if word == "lines":
        steps = [Step([f"line {n}"], ["\n"]) for n in range(2000)]
    if word == "endless":
        steps = TIDES * 200
    if word == "cut":
        steps = [Step(["größer ", "→ 漢字 "], ["👩‍👩‍👧‍👦\n"], ["é"])] * 20
    if drafting != "off":
        return steps
    texts = [text for step in steps for text in step.drafted + step.own]
    return [Step([], [text]) for text in texts]


def chunk_of(step: Step) -> dict[str, Any]:
    pieces = [{"text": text, "origin": "drafted"} for text in step.drafted]
    pieces += [{"text": text, "origin": "target"} for text in step.own]
    num_drafted = len(step.drafted) + len(step.rejected)
    extra = {"pieces": pieces, "rejected": list(step.rejected), "num_drafted": num_drafted}
    text = "".join(step.drafted + step.own)
    return {**chunk({"content": text}), "flashdraft": extra}


def held() -> list[dict[str, Any]]:
    """A thought, its tags left out, and a "<" that could have begun a call."""
    steps = [
        Step([], ["<think>"]),
        Step(["hm"], ["</think>"]),
        Step(["a", " <"], []),
        Step([], ["b"], ["tool"]),
        Step([" c"], []),
    ]
    deltas = [
        {},
        {"reasoning_content": "hm"},
        {"content": "a "},
        {"content": "<b"},
        {"content": " c"},
    ]
    parts = []
    for step, delta in zip(steps, deltas, strict=True):
        part = chunk_of(step) | {"choices": chunk(delta)["choices"]}
        parts.append(part)
    parts[0]["choices"] = []
    return [*parts, chunk({}, "stop")]


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def cut(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes with CR LF and comments, in portions that end inside of everything."""
    async for whole in events:
        told = b": still here\r\n" + whole.replace(b"\n", b"\r\n")
        for start in range(0, len(told), 7):
            yield told[start : start + 7]
            await asyncio.sleep(0)


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of a server that runs this app in a thread."""
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
