"""Whatever goes wrong, told in the shape that OpenAI's clients read: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

_SHOWN = 60  # characters of a value that an error names


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one line, for people.
        param: the field that is to blame.
        code: a word for programs.
        headers: beside the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """What OpenAI calls the type."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The response's, or that of an event in a stream that had begun."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_field(param: str, message: str, *, code: str | None = None) -> ApiError:
    """A field with a value that cannot be."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def unavailable(message: str) -> ApiError:
    """The server answers nothing new: it ends, or its engine has ended."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": "5"})


def refused_body(error: ValidationError) -> ApiError:
    """What pydantic found first in a body."""
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}")
    field = first["loc"][:1]
    if not field:
        return ApiError(400, f"the body is {_value(first)}; expected a JSON object")
    same = [other for other in details if other["loc"][:1] == field]  # one for every type that it might have had
    deepest = max(same, key=lambda detail: len(_path(detail["loc"])))
    param = _path(deepest["loc"])
    wanted = dict.fromkeys(_wanted(other["msg"]) for other in same if _path(other["loc"]) == param)
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_required_parameter")
    return bad_field(param, f"{' or '.join(wanted)}, found {_value(deepest)}")


def _path(places: tuple[int | str, ...]) -> str:
    """``messages[0].content``, without the names that pydantic gives to the alternatives of a union."""
    text = ""
    for place in places:
        if isinstance(place, int):
            text += f"[{place}]"
        elif place.isidentifier() and place not in ("str", "int", "float", "bool", "dict", "list"):
            text += f".{place}" if text else place
    return text


def _wanted(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def _value(detail: ErrorDetails) -> str:
    value = detail["input"]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
