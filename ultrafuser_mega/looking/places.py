"""Which rows a place means: what ``ultrafuser clean`` or ``ultrafuser synthesize`` left, or files as they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser_mega.cleaning.clean import class_of
from ultrafuser_mega.cleaning.files import KEPT, REPORT
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.files import expand_files
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.errors import InputError, writing

_MADE, _LEFT_OUT = "data", "left_out.jsonl"  # of a synthesis
_REPORTED = {"rows": dict, "rules": dict, "removed": dict, "examples": dict, "benchmarks": dict, "matches": list}


@dataclass(frozen=True)
class Found:
    """What a place holds.

    Attributes:
        files: of rows, each with the class of all of them; None: each row says.
        report: of a cleaning; None: there was none.
        left_out: of a synthesis: (class, step, reason) -> how many.
    """

    files: tuple[tuple[Path, str | None], ...]
    report: dict[str, Any] | None = None
    left_out: dict[tuple[str, str, str], int] | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A row: its class, the path of its topic (its file's name where it has none), what is said."""

    class_name: str
    topic: tuple[str, ...]
    conversation: Conversation


def find(place: Path) -> Found:
    """What there is to look at.

    Args:
        place: a folder that ``ultrafuser clean`` or ``ultrafuser synthesize`` made, a file, a folder of files, a glob.

    Raises:
        InputError: there is nothing, or a report that is none.
    """
    if (place / REPORT).is_file() and (place / KEPT).is_dir():
        report = _json(place / REPORT)
        try:
            files = tuple((place / one["file"], one["class"]) for one in report["files"])
            if any(not isinstance(report[name], kind) for name, kind in _REPORTED.items()):
                raise TypeError
        except (KeyError, TypeError):
            raise InputError(f"{place / REPORT}: is no report of ultrafuser clean") from None
        return Found(files, report)
    if (place / _MADE).is_dir():
        left_out = _left_out(place / _LEFT_OUT) if (place / _LEFT_OUT).is_file() else None
        return Found(tuple((path, None) for path in expand_files(place / _MADE)), left_out=left_out)
    return Found(tuple((path, None) for path in expand_files(place)))


def rows_of(files: Iterable[tuple[Path, str | None]]) -> Iterator[Seen | None]:
    """Every row, in order; None for one that is no conversation."""
    for path, class_name in files:
        stem = path.name.split(".")[0]
        for row in read_rows(path):
            try:
                conversation = to_conversation(row.value)
            except MalformedRowError:
                yield None
                continue
            own = class_of(row.value)
            yield Seen(class_name or (stem if own == "all" else own), _topic_of(row.value) or (stem,), conversation)


def _topic_of(row: dict[str, Any]) -> tuple[str, ...]:
    """A row's own topic, or its provenance's: a list from the widest to the narrowest, or one name."""
    provenance = row.get("provenance")
    topic = row.get("topic") or (provenance.get("topic") if isinstance(provenance, dict) else None)
    if isinstance(topic, str):
        return (topic,)
    return tuple(str(name) for name in topic) if isinstance(topic, list) else ()


def _json(path: Path) -> dict[str, Any]:
    with writing(path):
        text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is no JSON object")
    return value


def _left_out(path: Path) -> dict[tuple[str, str, str], int]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in read_rows(path):
        if isinstance(row.value, dict):
            of, step, reason = (str(row.value.get(name, "")) for name in ("class", "step", "reason"))
            counts[of, step, reason.partition(":")[0]] += 1
    return dict(sorted(counts.items()))
