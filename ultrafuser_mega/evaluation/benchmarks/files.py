"""Rows of benchmark files as published; what is missing or malformed is told with where to get it, or with its line."""

from __future__ import annotations

import gzip
import json
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.evaluation.benchmark import Benchmark, Item

Made = TypeVar("Made")


class JsonlBenchmark(Benchmark):
    """A benchmark whose file has one item to a line of JSON, packed by gzip or not.

    Attributes:
        fields: of every row, with the type of each.
    """

    fields: ClassVar[Mapping[str, type | tuple[type, ...]]]

    def items(self, data: Path) -> list[Item]:
        path = source_file(self, data)
        items = [at_line(path, number, self.item, row, number) for number, row in jsonl_rows(path, self.fields)]
        return checked(path, items)

    @abstractmethod
    def item(self, row: dict[str, Any], number: int) -> Item:
        """Of one row, which has ``fields``, and its line number.

        Raises:
            ValueError: with what is wrong in it.
        """


def source_file(benchmark: Benchmark, data: Path) -> Path:
    """The benchmark's file in ``data``; InputError where there is none."""
    path = data / benchmark.source
    if not path.is_file():
        raise InputError(f"{path}: no such file; {benchmark.name} needs it: get it from {benchmark.origin}")
    return path


def jsonl_rows(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) for every line that is not blank."""
    # Not splitlines, which also cuts at characters that JSON allows within a text, as U+2028.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, at_line(path, number, _row, line, fields)


def at_line(path: Path, number: int, function: Callable[..., Made], *arguments: object) -> Made:
    """``function(*arguments)``, whose ValueError is said with file and line."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise InputError(f"{path}:{number}: {error}") from None


def checked(path: Path, items: Iterable[Item]) -> list[Item]:
    """The items, of which there is one at least and no two have one id."""
    seen: dict[str, Item] = {}
    for item in items:
        if item.id in seen:
            raise InputError(f"{path}: two items have the id {item.id!r}; give every one its own")
        seen[item.id] = item
    if not seen:
        raise InputError(f"{path}: holds no item")
    return list(seen.values())


def _text(path: Path) -> str:
    with writing(path):
        packed = path.read_bytes()
    try:
        return (gzip.decompress(packed) if path.suffix == ".gz" else packed).decode("utf-8-sig")
    except (EOFError, OSError, UnicodeDecodeError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: is no {'packed ' if path.suffix == '.gz' else ''}UTF-8 text ({error})") from None


def _row(line: str, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"is no JSON object but {line[:40]}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            found = f"is {type(row[name]).__name__}" if name in row else "is missing"
            raise ValueError(f"{name} {found}; it must be {kinds}")
    return row
