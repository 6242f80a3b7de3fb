"""Rows out of files: every row with its place, in bounded memory, and nothing passed over in silence."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.data import readers
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.errors import InputError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(JSON_VALUES, max_size=6),
    indent=st.sampled_from([None, 0, 3, 40]),
    ascii_only=st.booleans(),
    window=st.integers(1, 60),
)
def test_an_array_gives_the_same_values_however_small_the_window_through_which_it_is_read(
    values: Any, indent: Any, ascii_only: Any, window: Any
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    text.encode("utf-8", "surrogatepass")
    with TemporaryDirectory() as folder, patch.object(readers, "WINDOW_BYTES", window):
        path = Path(folder) / "rows.json"
        path.write_bytes(text.encode("utf-8"))
        rows = list(read_rows(path))
    assert [row.value for row in rows] == values
    assert [row.number for row in rows] == list(range(1, len(values) + 1))
    assert all(row.end_byte <= len(text.encode()) for row in rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cut=st.integers(0, 200), window=st.integers(1, 60))
def test_a_truncated_array_is_an_error_that_names_file_and_line_wherever_it_was_cut(cut: Any, window: Any) -> None:
    text = json.dumps([{"a": 'x\\"y\n', "b": [1.5e3, -2, True, None]}] * 4, indent=2)
    text = text[: min(cut, len(text) - 1)]
    with TemporaryDirectory() as folder, patch.object(readers, "WINDOW_BYTES", window):
        path = Path(folder) / "rows.json"
        path.write_text("[" + text[1:])
        with pytest.raises(InputError) as raised:
            list(read_rows(path))
    assert str(raised.value).startswith(f"{path}:{text.count(chr(10)) + 1}:")


def test_array_rows_carry_the_line_on_which_they_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"a":\n 1},\n\n  {"a": 2}, {"a": 3}\n]\n')
    assert [(row.number, row.line) for row in read_rows(path)] == [(1, 2), (2, 5), (3, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"a": 1},\n{"a": oops}\n]', ":3: row 2: bad JSON: Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}\n]', ":3: expected ',' or ']' after an element, found '{'"),
        ('[{"a": 1}]\n\n{"a": 2}', ":3: '{' after the end of the array"),
        ('[{"a": 1},\n{"a": "line\nbreak"}]', ":2: row 2: bad JSON: Invalid control character"),
        ('[{"a": 1},\n]', ":2: row 2: bad JSON: Expecting value"),
    ],
)
def test_a_syntax_error_in_an_array_ends_the_reading_after_the_rows_before_it(
    tmp_path: Path, text: Any, message: Any
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    rows = read_rows(path)
    assert next(rows).value == {"a": 1}
    with pytest.raises(InputError) as raised:
        list(rows)
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_an_error_early_in_a_big_array_does_not_read_the_rest_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": oops},\n' + '{"a": 1},\n' * 1_000_000 + '{"a": 1}]')
    tracemalloc.start()
    with pytest.raises(InputError, match="row 1"):
        list(read_rows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 9 * readers.WINDOW_BYTES
    assert peak < 4 * readers.WINDOW_BYTES  # one window: as bytes, decoded, joined to the rest, and behind the error


@pytest.mark.parametrize("kind", ["array", "array on one line", "lines"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"

    def peak_of(count: int) -> int:
        row = json.dumps({"instruction": "x" * 60, "output": "y" * 60})
        separator = {"array": ",\n", "array on one line": ",", "lines": "\n"}[kind]
        body = separator.join([row] * count)
        path.write_text(body if kind == "lines" else f"[{body}]")
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == count
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    with patch.object(readers, "WINDOW_BYTES", 1 << 14):
        small, large = peak_of(1_000), peak_of(20_000)
    assert large < small + 20_000  # the file grew by 2.9 MB; a few interpreter objects may differ


def test_lines_that_are_not_json_are_named_and_the_next_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    rows = list(read_rows(path))
    assert [(row.number, row.line) for row in rows] == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert (rows[1].problem or "").startswith("bad JSON at column 6")
    assert rows[2].problem == "not UTF-8 at byte 8 of the line"
    assert (rows[3].problem or "").startswith("bad JSON: maximum recursion depth")
    assert rows[4].value == {"a": 2} and rows[4].problem is None


def test_the_first_character_decides_between_array_and_lines_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    lines, array = tmp_path / "lines.json", tmp_path / "array.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    array.write_bytes(b'\xef\xbb\xbf\n[{"a": 1},\n{"a": 2}]')
    assert [row.value["a"] for row in read_rows(lines)] == [1, 2]
    assert [(row.value["a"], row.line) for row in read_rows(array)] == [(1, 2), (2, 3)]


def test_bytes_that_are_not_utf8_in_an_array_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"a": 1},\n{"a": "\xff"}]')
    with pytest.raises(InputError, match=r"rows.json:2: not UTF-8 \(byte 0xff\)"):
        list(read_rows(path))


def test_a_row_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n{"a": "' + "x" * 5000)
    with patch.object(readers, "WINDOW_BYTES", 64), patch.object(readers, "LARGEST_ROW", 1 << 10):
        with pytest.raises(InputError, match=r"rows.json:2: row 2 has no end within"):
            list(read_rows(path))
        path.write_text('{"a": "' + "x" * 5000)
        with pytest.raises(InputError, match=r"rows.json:1: the line is longer than"):
            list(read_rows(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.json: cannot be read: No such file"):
        list(read_rows(tmp_path / "nowhere.json"))


def test_empty_files_and_empty_arrays_hold_no_rows(tmp_path: Path) -> None:
    for text in ("", "\n\n", "[]", " [ \n ] \n"):
        (tmp_path / "rows").write_text(text)
        assert list(read_rows(tmp_path / "rows")) == []
