"""Rows out of JSON, JSONL and Parquet files, one at a time, with the place of each.

Memory does not grow with the file: JSONL is read by the line, Parquet by the batch (by pyarrow), and a JSON
array through a sliding window in which ``json.JSONDecoder.raw_decode`` reads one element after the other.
Which of them a file is, and whether it is gzipped, its first bytes say (files.py).

What cannot be decoded is named, never passed over. A JSONL line that is not JSON is a row with a
``problem``, since the next line starts afresh. A syntax error inside an array leaves no way to tell
where the next element starts, so it ends the reading with an InputError whatever the caller prefers.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser_mega.data.files import GZIP_ERRORS, Bytes, Format, find_format, unpacked
from ultrafuser_mega.errors import InputError

WINDOW_BYTES = 1 << 20
LARGEST_ROW = 1 << 26  # characters of one array element, bytes of one line
_PARQUET_ROWS = 512  # decoded at a time
_LONGEST_TOKEN = 16  # what the window's end cuts, other than a string, is shorter: "-Infinity", "\\uXXXX"


@dataclass(frozen=True, slots=True)
class Row:
    """One element of an array, one non-blank line or one row of a table.

    ``number`` counts rows from 1; ``line`` is the line (from 1) on which the row starts, in a table its
    number. ``end_byte`` is how much of the file has been read, for a progress bar. ``problem`` is None or
    why the row could not be decoded, in which case ``value`` is None. ``raw`` is the line as it stands, but for white
    space at its end; None where rows are no lines.
    """

    number: int
    line: int
    end_byte: int
    value: Any
    problem: str | None = None
    raw: bytes | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a file, in order; blank lines are no rows.

    Raises InputError for a missing or unreadable file, for another format than JSON, JSONL and Parquet, for
    an array with a syntax error (with the row and the line), for damage in a gzipped or Parquet file, and for
    a row longer than 64 MiB.
    """
    match find_format(path):
        case Format.PARQUET:
            return _parquet_rows(path)
        case Format.ARRAY:
            return _unpacked(path, _array_rows)
        case Format.LINES:
            return _unpacked(path, _line_rows)


def _unpacked(path: Path, rows_of: Callable[[Path, Bytes, Callable[[], int]], Iterator[Row]]) -> Iterator[Row]:
    with path.open("rb") as raw, unpacked(raw) as file:
        try:
            yield from rows_of(path, file, raw.tell)  # of a gzipped file, how far the file itself has been read
        except GZIP_ERRORS as error:
            raise InputError(f"{path}: damaged gzip: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    size, number = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            total = file.metadata.num_rows
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    # What JSON has no word for (dates, bytes) becomes text: a row is a JSON value everywhere.
                    plain = json.loads(json.dumps(value, default=_as_text))
                    yield Row(number, number, size * number // total, plain)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged Parquet: {str(error).splitlines()[0]}") from None


def _as_text(value: object) -> str:
    """Columns that no writer marked as text hold bytes; where those are not UTF-8, reading them as text is refused."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _line_rows(path: Path, file: Bytes, position: Callable[[], int]) -> Iterator[Row]:
    number = line = 0
    while raw := file.readline(LARGEST_ROW + 1):
        line += 1
        if len(raw) > LARGEST_ROW:
            raise InputError(f"{path}:{line}: the line is longer than {LARGEST_ROW >> 20} MiB; is this JSONL?")
        raw = (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).rstrip()
        if not raw:
            continue
        number += 1
        value, problem = None, None
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start + 1} of the line"
        except json.JSONDecodeError as error:
            problem = f"bad JSON at column {error.colno}: {error.msg}"
        except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
            problem = f"bad JSON: {error}"
        yield Row(number, line, position(), value, problem, raw)


def _array_rows(path: Path, file: Bytes, position: Callable[[], int]) -> Iterator[Row]:
    window = _Window(path, file)
    window.take("[")
    number = 0
    if window.next_character() == "]":
        window.take("]")
    else:
        while True:
            number += 1
            window.next_character()
            line = window.line
            value = window.decode_element(number)
            yield Row(number, line, position(), value)
            if window.next_character() == "]":
                window.take("]")
                break
            window.take(",")
    if rest := window.next_character():
        raise InputError(f"{path}:{window.line}: {rest!r} after the end of the array; expected the end of the file")


class _Window:
    """The part of a text file between what has been consumed and what has been read."""

    def __init__(self, path: Path, file: Bytes) -> None:
        self.path = path
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text = ""
        self.position = 0
        self.line = 1
        self.at_end = False

    def fill(self) -> None:
        """Drop what was consumed and read on; doubling keeps the cost of one long element linear."""
        self.text = self.text[self.position :]
        self.position = 0
        chunk = self.file.read(max(WINDOW_BYTES, len(self.text)))
        self.at_end = not chunk
        try:
            self.text += self.decoder.decode(chunk, final=self.at_end)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise InputError(f"{self.path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skip white space; the character after it stays unread. Empty at the end of the file."""
        while True:
            position = self.position
            while position < len(self.text) and self.text[position] in " \t\r\n":
                position += 1
            self.advance(position)
            if position < len(self.text):
                return self.text[position]
            if self.at_end:
                return ""
            self.fill()

    def take(self, expected: str) -> None:
        found = self.next_character()
        if found != expected:
            what = f"{found!r}" if found else "the end of the file"
            wanted = "',' or ']' after an element" if expected == "," else f"{expected!r}"
            raise InputError(f"{self.path}:{self.line}: expected {wanted}, found {what}; the rest cannot be read")
        self.advance(self.position + 1)

    def decode_element(self, number: int) -> Any:
        """The JSON value at the window's start, reading on as long as it may only be cut off."""
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.position)
                may_go_on = isinstance(value, (int, float)) and end + _LONGEST_TOKEN > len(self.text)  # "0" of "0.5"
                if self.at_end or not may_go_on:
                    self.advance(end)
                    return value
            except json.JSONDecodeError as error:
                behind = self.text[error.pos + _LONGEST_TOKEN :]
                cut_off = error.msg.startswith("Unterminated string") or not behind.strip()
                if self.at_end or not cut_off:
                    line = self.line + self.text.count("\n", self.position, error.pos)
                    raise InputError(
                        f"{self.path}:{line}: row {number}: bad JSON: {error.msg}; "
                        "what follows in the array cannot be read: mend the file, or write it as JSONL"
                    ) from None
            except (RecursionError, ValueError) as error:
                raise InputError(f"{self.path}:{self.line}: row {number}: bad JSON: {error}") from None
            if len(self.text) - self.position > LARGEST_ROW:
                raise InputError(
                    f"{self.path}:{self.line}: row {number} has no end within {LARGEST_ROW >> 20} MiB; "
                    "an unclosed quote or bracket?"
                )
            self.fill()
