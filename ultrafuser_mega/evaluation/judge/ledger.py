"""What a judge was asked and what it said, one line of JSON each, so that nothing is paid for twice.

A line is {"key", "model", "messages", "settings", "reply", "input_tokens", "output_tokens"}; the key is a digest of
model, messages and settings, and "key" with "reply" is all that is needed of a line. Lines are only ever added, each in
one write: whatever ends a run, the next goes on from them. Two runs may not write one ledger at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from ultrafuser_mega.errors import InputError, writing


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    Attributes:
        messages: (role, text), in order.
        settings: of the reply: "temperature", "max_tokens".
    """

    messages: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def key(self, model: str) -> str:
        """What this request has as its name in a ledger, asked of ``model``."""
        return hashlib.sha256(json.dumps(self.as_json(model), sort_keys=True).encode()).hexdigest()

    def as_json(self, model: str) -> dict[str, Any]:
        """As a ledger and a chat endpoint have it."""
        messages = [{"role": role, "content": text} for role, text in self.messages]
        return {"model": model, "messages": messages, "settings": dict(self.settings)}


@dataclass(frozen=True)
class Reply:
    """What a judge said, and what that took; 0 tokens where nobody counted."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class Ledger:
    """The replies in one file.

    Args:
        path: of the file; it need not be there yet.

    Raises:
        InputError: a line is damaged, other than by the end of the run that was writing it; or another run writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        self.models: set[str] = set()
        self._lock = Lock()
        # What has to be done before another line is added, and not before: the file may be none of ours.
        self._before = b""  # what is missing behind the last line
        self._whole: int | None = None  # bytes of whole lines, where the last one is cut off
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file_lock = FileLock(f"{path}.lock", timeout=0)
            try:
                self._file_lock.acquire()
            except Timeout:
                raise InputError(f"{path}: another run writes this ledger; wait for it, or name another") from None
            self._read()

    def add(self, request: Request, model: str, reply: Reply) -> None:
        """Keep a reply, on the disk when this returns."""
        key = request.key(model)
        line = {"key": key, **request.as_json(model), "reply": reply.text}
        line |= {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens}
        with self._lock, writing(self.path), self.path.open("ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
                self._whole = None
            file.write(self._before + json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._before = b""
            file.flush()
            os.fsync(file.fileno())
            self.replies[key] = reply

    def close(self) -> None:
        """Let others write it."""
        self._file_lock.release()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        text = self.path.read_bytes()
        last = text.rpartition(b"\n")[2]
        if last and not _is_json(last):  # the run ended in the midst of this line
            text = text[: len(text) - len(last)]
            self._whole = len(text)
        elif last:
            self._before = b"\n"
        for number, line in enumerate(text.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.replies[row["key"]] = Reply(
                    _text(row["reply"]), int(row.get("input_tokens", 0)), int(row.get("output_tokens", 0))
                )
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{self.path}:{number}: is no line of a ledger ({error!r}); every one has a key and a reply"
                ) from None
            if isinstance(row.get("model"), str):
                self.models.add(row["model"])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _text(reply: Any) -> str:
    if not isinstance(reply, str):
        raise TypeError(f"reply is {type(reply).__name__}, not text")
    return reply
