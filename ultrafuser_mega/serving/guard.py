"""In front of every route: keys, sizes, a name for what goes wrong, and a line of the log that holds no content."""

from __future__ import annotations

import logging
import time
import traceback
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser_mega.serving.errors import ApiError
from ultrafuser_mega.serving.keys import Keys
from ultrafuser_mega.serving.metrics import Metrics

_LOG = logging.getLogger(__name__)
OPEN = frozenset({"/", "/health", "/ready", "/version", "/metrics"})  # for probes and people; they hold no content


class Guard:
    """An ASGI application around another.

    Args:
        app: what is guarded.
        keys: that open it.
        largest: bytes of a body.
        metrics: get every response.
    """

    def __init__(self, app: ASGIApp, keys: Keys, largest: int, metrics: Metrics) -> None:
        self._app, self._keys, self._largest, self._metrics = app, keys, largest, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._counted(receive), noted)
        except ApiError as error:
            if not status:
                await error_response(error)(scope, receive, noted)
        except ClientDisconnect:
            pass  # before its request was whole
        except Exception as error:
            # Not its message, which may quote a body.
            where = "".join(traceback.format_tb(error.__traceback__)[-6:])
            _LOG.error("%s in %s %s\n%s", type(error).__name__, scope["method"], _route(scope), where)
            if not status:
                named = ApiError(
                    500, f"the server failed ({type(error).__name__}); its log has more", code="internal_error"
                )
                await error_response(named)(scope, receive, noted)
        finally:
            # The pattern, not the path: whatever a client puts there is its own.
            self._metrics.response(_route(scope), status)
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO
            _LOG.log(level, "%s %s %s %.3f s", scope["method"], _route(scope), status or "-", time.monotonic() - begun)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if scope["path"] not in OPEN and not self._keys.open(headers.get(b"authorization")):
            raise ApiError(
                401,
                "no valid key; send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._largest:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._largest:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._largest} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _route(scope: Scope) -> str:
    route: Any = scope.get("route")
    return getattr(route, "path", None) or ("/" if scope["path"] == "/" else "(no such path)")


def error_response(error: ApiError) -> JSONResponse:
    """The response that an error is."""
    return JSONResponse(error.body(), error.status, error.headers)
