"""The routes: a request's way from its bytes to the worker, and the way back.

Each step that may take long has its place: bodies are read and prompts tokenised on two threads
beside the event loop, texts are made on the worker's. What a body may hold is `protocol`'s, what an
answer looks like is `replies`'.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import ParamSpec, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from flashdraft.errors import FlashDraftError
from flashdraft.files import Json
from flashdraft.generate import Model
from flashdraft.serve.errors import ApiError
from flashdraft.serve.limits import BodyLimit, HeaderLimit, Keys, refusal
from flashdraft.serve.logs import Traced
from flashdraft.serve.openapi import described, responses
from flashdraft.serve.page import PAGE_PATHS, page_routes
from flashdraft.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from flashdraft.serve.replies import Reply, new_head
from flashdraft.serve.responses import EventStream, Whole, as_refusal
from flashdraft.serve.tokens import TokenTexts
from flashdraft.serve.translate import (
    Call,
    Settings,
    check_model,
    count_answers,
    detokenized,
    tokenized,
    translate,
)
from flashdraft.serve.worker import Worker

__all__ = ["OPEN", "ROUTES", "Options", "make_app"]

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound=Body)
_CARD = "/v1/models/{name:path}"
_PREPARING = 2  # threads that read bodies and tokenise: the engine needs the cores
OPEN = PAGE_PATHS | {"/health", "/ready"}  # what needs no key: the page asks for it
ROUTES = PAGE_PATHS | frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
    }
)


@dataclass(frozen=True)
class Options:
    """What a server is told at its start, beside its model."""

    model_name: str
    keys: tuple[bytes, ...] = ()  # none: everybody may ask
    max_body_bytes: int = 4 * 2**20
    cors_origins: tuple[str, ...] = ()
    keep_alive: float = 15.0  # seconds without a chunk before a comment is sent
    settings: Settings = field(default_factory=Settings)


def make_app(worker: Worker, options: Options) -> FastAPI:
    """The server's app; the worker is started and stopped with it."""
    api = _Api(worker, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()
        api.pool.shutdown()

    app = FastAPI(
        title="FlashDraft",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_routes(app, api)
    described(app)

    app.add_exception_handler(HTTPException, _as_openai)
    app.add_exception_handler(ApiError, _as_openai)
    app.add_exception_handler(FlashDraftError, _as_openai)

    # the last one added is the outermost
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(HeaderLimit)
    if options.keys:
        app.add_middleware(Keys, keys=options.keys, open_paths=OPEN)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(Traced, metrics=worker.metrics, routes=ROUTES)
    return app


def _add_routes(app: FastAPI, api: "_Api") -> None:
    app.include_router(page_routes())
    app.get("/health", responses=responses("/health"))(api.health)
    app.get("/ready", responses=responses("/ready"))(api.ready)
    app.get("/metrics", responses=responses("/metrics"))(api.metrics)
    app.get("/v1/models", responses=responses("/v1/models"))(api.models)
    app.get(_CARD, responses=responses(_CARD))(api.model)

    _post(app, "/v1/chat/completions", api.chat, ChatBody)
    _post(app, "/v1/completions", api.complete, CompletionBody)
    _post(app, "/tokenize", api.tokenize, TokenizeBody)
    _post(app, "/detokenize", api.detokenize, DetokenizeBody)


def _post(
    app: FastAPI, path: str, function: Callable[..., Awaitable[Response]], kind: type[Body]
) -> None:
    """A route whose body we read ourselves, so that its schema must be named here."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema}}
    extra = {"requestBody": {"required": True, "content": content}}
    app.post(path, responses=responses(path), openapi_extra=extra)(function)


async def _as_openai(request: Request, error: Exception) -> Response:
    """Any error as a response in OpenAI's shape."""
    if isinstance(error, HTTPException):
        path = request.scope["path"][:200]
        told = f"{request.method} {path}: {error.detail.lower()}"
        code = error.detail.lower().replace(" ", "_")
        error = ApiError(error.status_code, told, code=code, headers=error.headers)
    return refusal(as_refusal(error))


class _Api:
    """The routes' functions."""

    def __init__(self, worker: Worker, options: Options) -> None:
        self.worker = worker
        self.options = options
        self.pool = ThreadPoolExecutor(_PREPARING, "prepare")
        self._created = int(time())
        self._texts: TokenTexts | None = None

    # --- texts ------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._generate(request, ChatBody)

    async def complete(self, request: Request) -> Response:
        """Go on with a text, or with tokens."""
        return await self._generate(request, CompletionBody)

    async def _generate(
        self, request: Request, kind: type[ChatBody] | type[CompletionBody]
    ) -> Response:
        body = await self._body(request, kind)
        places = count_answers(body, self.options.settings)
        stream = self.worker.reserve(places)  # before anything is tokenised
        try:
            call = await self._translated(request, body)
            stream.submit(call.requests)
            reply = self._reply(call)
            on_end = partial(self._count, request, reply)
            if body.stream:
                return EventStream(stream, reply, on_end, self.options.keep_alive)
            return Whole(stream, reply, on_end)
        except BaseException:
            stream.close()
            raise

    async def _translated(self, request: Request, body: ChatBody | CompletionBody) -> Call:
        owner = request.scope["state"].get("owner", "")
        settings = self.options.settings
        work = partial(translate, owner=owner)
        return await self._aside(work, body, self._model, settings)

    def _reply(self, call: Call) -> Reply:
        if self._texts is None:
            self._texts = TokenTexts(self._model.tokenizer)
        return Reply(call, new_head(call, self.options.model_name), self._texts)

    def _count(self, request: Request, reply: Reply) -> None:
        """A call has come to its end: its usage goes into the metrics and the log."""
        usage = reply.usage
        self.worker.metrics.count(usage)
        facts = request.scope["state"]["facts"]
        facts["prompt_tokens"] = usage.num_prompt
        facts["cached_tokens"] = usage.num_cached
        facts["completion_tokens"] = usage.num_new
        facts["accepted_tokens"] = usage.num_accepted

    # --- tokens -----------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """Tokens of a prompt, or of a conversation as the chat template tells it."""
        self.worker.check_ready()
        body = await self._body(request, TokenizeBody)
        return await self._aside(_tokens_told, body, self._model)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens, special ones included."""
        self.worker.check_ready()
        body = await self._body(request, DetokenizeBody)
        return JSONResponse({"prompt": await self._aside(detokenized, body, self._model)})

    # --- the server itself ------------------------------------------------------------------------

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """The same, by its name."""
        check_model(name, [self.options.model_name])
        return JSONResponse(self._card())

    def _card(self) -> Json:
        model = self.worker.model
        return {
            "id": self.options.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "flashdraft",
            "max_model_len": None if model is None else model.target.context_length,
        }

    async def health(self) -> Response:
        """Whether the process is alive; 503 where only a restart helps."""
        is_alive = self.worker.state != "dead"
        state = "ok" if is_alive else "dead"
        return JSONResponse({"status": state}, 200 if is_alive else 503)

    async def ready(self) -> Response:
        """Whether requests are taken."""
        if self.worker.is_ready:
            return JSONResponse({"status": "ready"})
        state = "dead" if self.worker.state == "ready" else self.worker.state
        return JSONResponse({"status": state}, 503, {"retry-after": "1"})

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        page = self.worker.metrics.page()
        return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})

    # --- what they share --------------------------------------------------------------------------

    @property
    def _model(self) -> Model:
        model = self.worker.model
        assert model is not None, "check_ready comes first"
        return model

    async def _body(self, request: Request, kind: type[B]) -> B:
        """The request's body. Raises ApiError, also for a model that is not served."""
        _check_type(request)
        raw = await request.body()
        body = await self._aside(read_body, raw, kind)
        check_model(body.model, [self.options.model_name])
        return body

    async def _aside(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Have it done by one of the two threads that are there for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, partial(work, *args, **kwargs))


def _tokens_told(body: TokenizeBody, model: Model) -> Response:
    tokens = tokenized(body, model)
    context = model.target.context_length
    told: Json = {"count": len(tokens), "max_model_len": context, "tokens": tokens}
    told["token_strs"] = None
    if body.return_token_strs:
        name_of = model.tokenizer.convert_ids_to_tokens
        told["token_strs"] = [name_of(token) for token in tokens]
    return JSONResponse(told)


def _check_type(request: Request) -> None:
    """JSON has to say that it is: a page elsewhere cannot send it without being asked first."""
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        told = "the body must be JSON: send the header `Content-Type: application/json`"
        raise ApiError(415, told, code="unsupported_media_type")
