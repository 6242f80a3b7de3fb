"""The routes of OpenAI's interface, and those of vLLM's that its clients know beside them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from ultrafuser_mega.reporting.palette import COLORS
from ultrafuser_mega.serving import chat, completions
from ultrafuser_mega.serving.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from ultrafuser_mega.serving.errors import ApiError, refused_body, unavailable
from ultrafuser_mega.serving.guard import Guard, error_response
from ultrafuser_mega.serving.keys import Keys
from ultrafuser_mega.serving.metrics import Metrics
from ultrafuser_mega.serving.served import Served, Wanted
from ultrafuser_mega.serving.shapes import stream
from ultrafuser_mega.serving.traffic import Traffic

_BODY_SECONDS = 60  # for a client to send its body
_HUNG_UP = 499  # what nginx notes; nobody reads it
AnyBody = TypeVar("AnyBody", bound=Body)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what, "content": {"application/json": {"schema": _ERROR}}}
    for status, what in {
        400: "a field is wrong, or not offered",
        401: "no valid key",
        404: "no such model or path",
        408: "the body came too slowly",
        413: "the body is too large",
        415: "the body is no JSON",
        429: "too many answers are under way",
        500: "the answer failed",
        503: "the server ends",
    }.items()
}


@dataclass(frozen=True)
class Parts:
    """What the routes are made of.

    Attributes:
        served: the model.
        traffic: its answers.
        metrics: its numbers.
        keys: that open it.
        largest: bytes of a body.
    """

    served: Served
    traffic: Traffic
    metrics: Metrics
    keys: Keys
    largest: int


def make_app(parts: Parts) -> ASGIApp:
    """The application; the worker of ``parts.traffic`` is the caller's to start and stop."""
    served, traffic, metrics = parts.served, parts.traffic, parts.metrics
    app = FastAPI(title="ultrafuser", version=version("ultrafuser_mega"), docs_url=None, redoc_url=None)
    created = int(time.time())
    encoding = ThreadPoolExecutor(1, "encoding")  # tokenizers are for one thread, and a long text takes its time
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("__COLORS__", json.dumps(COLORS))

    async def encoded(work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(encoding, work, *args)

    async def read(request: Request, kind: type[AnyBody]) -> AnyBody:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise ApiError(415, "content-type: expected application/json", code="unsupported_media_type")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                raw = await request.body()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS} s", code="timeout") from None
        try:
            body = kind.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise refused_body(error) from None
        if body.model not in (None, served.name):
            raise _no_model(body.model, served)
        return body

    def takes(kind: type[Body]) -> dict[str, Any]:
        """How a body is described, which FastAPI does not read itself: it would take what is no JSON."""
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    schemas: dict[str, Any] = {}

    async def respond(
        request: Request,
        body: ChatBody | CompletionBody,
        wanted: Callable[..., list[Wanted]],
        prefix: str,
        whole: Callable[..., Coroutine[Any, Any, dict[str, Any]]],
        pieces: Callable[..., Any],
    ) -> Response:
        id = f"{prefix}-{uuid.uuid4().hex}"
        traffic.admit(body.answers)  # before the work of encoding, and the memory for it
        answers = await encoded(wanted, body, id)
        if body.stream:
            return await _unless_hung_up(request, stream(pieces(body, id, answers, served, traffic)))
        return await _unless_hung_up(request, _as_json(whole(body, id, answers, served, traffic)))

    @app.post("/v1/chat/completions", responses=_ERRORS, openapi_extra=takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body = await read(request, ChatBody)
        return await respond(request, body, served.chat, "chatcmpl", chat.answered, chat.chunks)

    @app.post("/v1/completions", responses=_ERRORS, openapi_extra=takes(CompletionBody))
    async def text_completions(request: Request) -> Response:
        body = await read(request, CompletionBody)
        return await respond(request, body, served.completions, "cmpl", completions.answered, completions.chunks)

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.describe(created)]}

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise _no_model(name, served)
        return served.describe(created)

    @app.post("/tokenize", responses=_ERRORS, openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        return await encoded(_tokenized, served, await read(request, TokenizeBody))

    @app.post("/detokenize", responses=_ERRORS, openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, str]:
        body = await read(request, DetokenizeBody)
        return {"prompt": await encoded(served.text, body.tokens)}

    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        if (failure := traffic.worker.failure) is not None:
            raise unavailable(failure)
        return {"status": "ok"}

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        if (refusal := traffic.refusal) is not None:
            raise unavailable(refusal)
        return {"status": "ready"}

    @app.get("/version")
    async def versions() -> dict[str, str]:
        return {"version": version("ultrafuser_mega")}

    @app.get("/metrics", response_class=Response)
    async def numbers() -> Response:
        return Response(metrics.text(traffic.worker.stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(ApiError(error.status_code, str(error.detail).lower(), headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(ApiError(400, "the address or a header is malformed"))

    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
    return Guard(app, parts.keys, parts.largest, metrics)


# The page has everything in itself and asks this server alone; nobody may frame it or read it from elsewhere.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _no_model(name: str | None, served: Served) -> ApiError:
    message = f"model: no model {str(name)[:80]!r} here; this server has {served.name!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def _tokenized(served: Served, body: TokenizeBody) -> dict[str, Any]:
    """vLLM's answer, for the first specialist, and for each of a conversation's prompts its ids and text."""
    if body.prompt is not None:
        prompts = dict.fromkeys(served.names, served.raw(body.prompt, "prompt", body.add_special_tokens))
    else:
        prompts = {name: list(ids) for name, ids in served.conversation(body.messages or []).items()}
    ids = prompts[served.names[0]]
    strings = [served.vocabulary.text(token) for token in ids] if body.return_token_strs else None
    specialists = {name: {"tokens": own, "text": served.text(own)} for name, own in prompts.items()}
    return {
        "count": len(ids),
        "max_model_len": served.longest,
        "tokens": ids,
        "token_strs": strings,
        "specialists": specialists,
    }


async def _as_json(work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    return JSONResponse(await work)


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What ``work`` gives, unless the client goes first, which ends it."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=_HUNG_UP)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
