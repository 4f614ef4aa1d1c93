"""The HTTP application: routes, errors, and what stands before them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import PreTrainedTokenizerBase

from icecache.errors import ConfigError, HostMemoryExceeded, IceCacheError, InputError, QueueFull
from icecache.serve.answers import Shape, chat_shape, completion_shape, stream, whole
from icecache.serve.guard import Guard, error_body
from icecache.serve.job import Job, Wish
from icecache.serve.metrics import Metrics
from icecache.serve.schema import ChatBody, CompletionBody
from icecache.serve.worker import Worker

__all__ = ["ServeSettings", "make_app"]

_RETRY_SECONDS = 5
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_SAFE = {
    "content-security-policy": "default-src 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Settings of the application.

    Parameters
    ----------
    model_name : str
        What clients call the model.
    api_key : str, optional
    max_body_bytes : int, default 8 MiB
    allowed_hosts : tuple of str
        Names that clients may call the server by; anything else is refused, so that no web page
        reaches a local server under a name of its own.
    """

    model_name: str
    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    allowed_hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")


def make_app(
    worker: Worker, tokenizer: PreTrainedTokenizerBase, metrics: Metrics, settings: ServeSettings
) -> FastAPI:
    """Return the application of a worker, which it closes when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    # the interactive pages load scripts from elsewhere
    app = FastAPI(title="IceCache", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app, metrics)
    _add_pages(app)
    _add_openai(app, worker, tokenizer, settings)

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are served."""
        alive = worker.is_alive
        status = {"status": "ok" if alive else "the engine has stopped"}
        return JSONResponse(status, 200 if alive else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_middleware(
        Guard,
        api_key=settings.api_key,
        max_body_bytes=settings.max_body_bytes,
        on_refusal=metrics.refused,
    )
    if settings.allowed_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.allowed_hosts))
    return app


def _add_openai(
    app: FastAPI, worker: Worker, tokenizer: PreTrainedTokenizerBase, settings: ServeSettings
) -> None:
    known = settings.model_name
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in (
            (400, "the request cannot be served as it is"),
            (401, "the API key is missing or wrong"),
            (404, "no such model"),
            (413, "the body is too large"),
            (429, "no memory or no room in the queue now; see Retry-After"),
            (503, "the engine has stopped"),
        )
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Return the one model that is served."""
        return {"object": "list", "data": [_model(known)]}

    @app.get("/v1/models/{name:path}", responses={404: refusals[404]})
    async def model(name: str) -> dict[str, Any]:
        """Return the model that is served, by its name."""
        _check_model(name, known)
        return _model(known)

    @app.post("/v1/chat/completions", responses=refusals)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        _check_model(body.model, known)
        if tokenizer.chat_template is None:
            raise InputError("the model has no chat template; use /v1/completions")
        messages = [{"role": each.role, "content": each.text} for each in body.messages]
        try:
            prompt = await asyncio.to_thread(
                tokenizer.apply_chat_template,
                messages,
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the messages: {error}") from error
        return await _answer(worker, body, request, str(prompt), chat_shape(known))

    @app.post("/v1/completions", responses=refusals)
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Continue a text."""
        _check_model(body.model, known)
        return await _answer(worker, body, request, body.text_or_ids, completion_shape(known))


async def _answer(
    worker: Worker,
    body: ChatBody | CompletionBody,
    request: Request,
    prompt: str | list[int],
    shape: Shape,
) -> Response:
    wish = Wish(
        prompt=prompt,
        is_template=isinstance(body, ChatBody),
        most_tokens=body.most_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stops=body.stops,
        budget=body.budget,
        live=body.live,
    )
    job = await worker.submit(wish)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        pieces = stream(job, shape, with_usage, status_of, lambda: worker.cancel(job))
        return StreamingResponse(
            pieces, media_type="text/event-stream", headers={"cache-control": "no-store"}
        )
    return JSONResponse(await _unless_gone(job, shape, request, worker))


async def _unless_gone(job: Job, shape: Shape, request: Request, worker: Worker) -> dict[str, Any]:
    """Wait for a whole answer, or for the client to go, which ends the request."""
    answer = asyncio.ensure_future(whole(job, shape))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(499, "the client has gone")
        return answer.result()
    finally:
        worker.cancel(job)
        for task in (answer, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_model(name: str, known: str) -> None:
    if name != known:
        raise HTTPException(404, f"no model {name!a} here; there is {known!r}")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "icecache"}


def _add_pages(app: FastAPI) -> None:
    folder = files("icecache.serve") / "page"
    for path, (name, kind) in _PAGE.items():
        content = (folder / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=_SAFE)

        app.add_api_route(path, page, include_in_schema=False, response_model=None)


def status_of(error: IceCacheError) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, HostMemoryExceeded | QueueFull):
        return 429
    return 400 if isinstance(error, InputError | ConfigError) else 503


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Response:
        metrics.refused(status)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if status == 429 else kind
        body = error_body(message, kind, code=code)
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # where, and what is wrong; never what was sent
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = str(first["msg"]).removeprefix("Value error, ")
        return refuse(400, f"{where}: {message}" if where else message)

    @app.exception_handler(IceCacheError)
    async def refused(request: Request, error: IceCacheError) -> Response:
        status = status_of(error)
        if status == 429:
            return refuse(status, str(error), **{"retry-after": str(_RETRY_SECONDS)})
        return refuse(status, str(error))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        code = "model_not_found" if error.status_code == 404 else None
        return refuse(error.status_code, str(error.detail), code, **dict(error.headers or {}))
