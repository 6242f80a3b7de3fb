"""What is asked of a model and what it said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

Messages = tuple[dict[str, str], ...]

#: What a reply was worth: used; no form that was asked for; the model or a filter refused; cut at max_tokens; nothing
#: in it; no reply in OpenAI's protocol.
GOOD, MALFORMED, REFUSED, CUT, EMPTY, BROKEN = "good", "malformed", "refused", "cut", "empty", "broken"

_MOST_COUNTED = 2**53  # tokens that an endpoint can mean when it says so
_OVERHEAD = 256, 16  # tokens that a chat template may add: to a conversation, to each of its messages


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        of: the class of data.
        step: as the configuration names it.
        model: as the configuration names it.
        body: what is sent.
        version: of the prompt template.
        number: of the call among those that otherwise ask the same, and of the attempt: "3.0".
    """

    of: str
    step: str
    model: str
    body: dict[str, Any]
    version: str
    number: str

    @cached_property
    def key(self) -> str:
        """Its name in the ledger: nothing that the reply depends on can change without it."""
        parts = [self.of, self.step, self.body, self.version, self.number]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]

    @property
    def most_read(self) -> int:
        """Tokens that it can at most be: a token has at least one byte."""
        messages = self.body["messages"]
        schema = json.dumps(self.body.get("response_format", ""))
        text = sum(len(message["content"].encode()) for message in messages) + len(schema)
        return text + _OVERHEAD[0] + _OVERHEAD[1] * len(messages)

    @property
    def most_written(self) -> int:
        """Tokens that the reply can at most have."""
        return self.body.get("max_tokens") or self.body["max_completion_tokens"]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: of the message; "" without one.
        raw: the body, where it was no reply in OpenAI's protocol.
        finish: why the model stopped.
        read, written: tokens as the endpoint counted them.
        counted: False where it did not, and they are the most it can have been.
        served: the model's name and fingerprint, as the endpoint gave them.
        seconds: from sending to the last byte.
        refusal: in the model's words, where the protocol says that it is one.
    """

    text: str
    raw: str | None = None
    finish: str | None = None
    read: int = 0
    written: int = 0
    counted: bool = True
    served: str | None = None
    seconds: float = 0.0
    refusal: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong with it whatever was asked."""
        if self.raw is not None:
            return BROKEN
        if self.refusal is not None or self.finish == "content_filter":
            return REFUSED
        if self.finish == "length":
            return CUT
        return None if self.text.strip() else EMPTY


class UnreadableError(ValueError):
    """A reply has not the form that was asked for; the message says what is missing."""


@dataclass(frozen=True)
class Form:
    """The form of a reply.

    Attributes:
        read: the text as what it was asked for; raises UnreadableError.
        schema: for endpoints that hold models to one.
        as_json: what is said of the form, behind the question, where the schema is sent along.
        as_text: what is said of it where it is not.
    """

    read: Callable[[str], Any]
    schema: dict[str, Any] | None = None
    as_json: str = ""
    as_text: str = ""


@dataclass(frozen=True)
class Call:
    """A question, and the form of its reply.

    Attributes:
        of, step, messages, version: as requests have them.
        number: of the call among those that otherwise ask the same.
    """

    of: str
    step: str
    messages: Messages
    form: Form
    version: str = "1"
    number: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of a call.

    Attributes:
        value: as its form has it; None where nothing could be used.
        key: of the reply in the ledger.
        faults: of replies that could not be used, and of an endpoint that gave none.
    """

    value: Any
    key: str | None
    faults: Sequence[str] = field(default_factory=tuple)


def reply_of(text: str, request: Request, seconds: float) -> Reply:
    """The reply in an endpoint's body, which may be anything."""
    try:
        body = json.loads(text)
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content")
        refusal = message.get("refusal")
        finish = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        body, content, refusal, finish = _object(text), None, None, None
        raw: str | None = text
    else:
        raw = None if content is None or isinstance(content, str) else text
    read, written, counted = _usage(body.get("usage"), request)
    served = [whole_characters(str(body[name])) for name in ("model", "system_fingerprint") if body.get(name)]
    return Reply(
        text=whole_characters(content) if isinstance(content, str) else "",
        raw=None if raw is None else whole_characters(raw),
        finish=whole_characters(finish) if isinstance(finish, str) else None,
        read=read,
        written=written,
        counted=counted,
        served=" ".join(served) or None,
        seconds=seconds,
        refusal=whole_characters(refusal) if isinstance(refusal, str) and refusal else None,
    )


def whole_characters(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, which JSON can hold and no file or database can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _usage(usage: Any, request: Request) -> tuple[int, int, bool]:
    if isinstance(usage, dict):
        read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if _is_count(read) and _is_count(written):
            return read, written, True
    return request.most_read, request.most_written, False


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MOST_COUNTED


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
