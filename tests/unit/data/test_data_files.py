"""Entries of the configuration become files, whose format is what their bytes say and never a guess."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.data.conversation import MalformedRowError, to_conversation
from ultrafuser_mega.data.files import expand_files
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.errors import InputError

ROWS = [{"prompt": f"a {number}", "completion": "b"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def test_an_entry_is_a_file_a_folder_of_data_files_or_a_glob_in_the_order_of_names(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (shards / "deeper").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.gz", "README.md", ".c.jsonl", "_SUCCESS", "deeper/d.json", "[x].json"):
        (shards / name).write_text(LINES)
    names = [file.name for file in expand_files(shards)]
    assert names == ["[x].json", "a.jsonl.gz", "b.jsonl"]
    assert [file.name for file in expand_files(shards / "*.jsonl*")] == ["a.jsonl.gz", "b.jsonl"]
    assert [file.name for file in expand_files(shards / "**" / "*.json")] == ["[x].json", "d.json"]
    assert expand_files(shards / "[x].json") == [shards / "[x].json"], "a file of that very name comes first"


def test_a_glob_may_start_in_a_folder_whose_name_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data [v1]" / "b").mkdir(parents=True)
    (tmp_path / "data [v1]" / "b" / "a.jsonl").write_text(LINES)
    assert expand_files(tmp_path / "data [v1]" / "*" / "*.jsonl") == [tmp_path / "data [v1]" / "b" / "a.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert expand_files(Path("data [v1]/b/*.jsonl")) == [Path("data [v1]/b/a.jsonl")]
    assert expand_files(Path("d*/b/a.jsonl")) == [Path("data [v1]/b/a.jsonl")]


def test_an_entry_that_stands_for_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    for entry, reason in (("*.jsonl", "no file matches"), ("a.jsonl", "no such file"), (".", "a folder without data")):
        with pytest.raises(InputError, match=reason) as raised:
            expand_files(tmp_path / entry)
        assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS, indent=1)])
def test_a_gzipped_file_gives_the_rows_of_the_plain_one_whatever_its_name(tmp_path: Path, text: str) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed.json"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    rows = list(read_rows(packed))
    assert [(row.number, row.line, row.value) for row in rows] == [
        (row.number, row.line, row.value) for row in read_rows(plain)
    ]
    assert rows[-1].end_byte <= packed.stat().st_size, "progress goes by the file's own size"


@pytest.mark.parametrize("cut", [5, 40])
def test_a_damaged_gzip_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-cut])
    with pytest.raises(InputError, match=r"rows.jsonl.gz: damaged gzip: "):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", b"instruction,output\nadd,3\n", "is CSV; expected JSON, JSONL"),
        ("rows.tsv.gz", gzip.compress(b"instruction\toutput\nadd\t3\n", mtime=0), "is TSV; expected"),
        (
            "rows.jsonl",
            b"instruction,output\nadd,3\n",
            "its lines are no JSON objects .the first: 'instruction,output'",
        ),
        ("rows.jsonl", b'"a"\n"b"\n', "its lines are no JSON objects"),
        (
            "rows.json",
            b'{\n "data": [\n  {"prompt": "a"}\n ]\n}\n',
            "is one JSON object over many lines; expected an array",
        ),
        (
            "rows.json",
            b'{"data": [\n' + b'{"prompt": "a", "completion": "%s"},\n' % (b"b" * 500) * 300 + b'{"prompt": "a"}\n]}',
            "is one JSON object over many lines",
        ),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd....", "is zstd-compressed; expected"),
        ("rows.zip", b"PK\x03\x04....", "is a zip archive; expected"),
        ("rows.arrow", b"ARROW1\0\0", "is an Arrow file; expected"),
        ("rows.jsonl", '{"prompt": "a"}'.encode("utf-16"), "is UTF-16 text; expected"),
    ],
)
def test_another_format_is_refused_by_its_name(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=reason) as raised:
        read_rows(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)


def test_bad_lines_do_not_make_another_format_of_a_file_that_has_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("oops\n{broken\n" + LINES)
    assert [row.problem is None for row in read_rows(path)] == [False, False, True, True, True]
    path.write_text("{\n" + LINES)
    assert [row.problem is None for row in read_rows(path)] == [False, True, True, True]
    path.write_text('{"prompt": \n' + LINES * 1000)
    assert [row.problem is None for row in read_rows(path)][:3] == [False, True, True]
    path.write_text('{"prompt": "a\n{broken\n')
    assert all(row.problem for row in read_rows(path)), "lines that mean to be objects are malformed rows"


def test_parquet_gives_plain_json_values(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "é", "weight": None},
                {"role": "assistant", "content": "b", "weight": 0},
            ]
        },
        {"messages": None},
    ]
    table = pyarrow.table({"messages": [row["messages"] for row in rows], "raw": [b"\xff", None]})
    parquet.write_table(table, tmp_path / "part-0", row_group_size=1)
    read = list(read_rows(tmp_path / "part-0"))
    assert [row.value["messages"] for row in read] == [row["messages"] for row in rows]
    assert [row.value["raw"] for row in read] == ["\udcff", None]
    assert [(row.number, row.line) for row in read] == [(1, 1), (2, 2)]
    content = (tmp_path / "part-0").read_bytes()
    (tmp_path / "part-1").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="part-1: damaged Parquet: ") as raised:
        list(read_rows(tmp_path / "part-1"))
    assert "\n" not in str(raised.value)


def test_bytes_of_parquet_are_text_where_they_are_utf8_and_refused_where_not(tmp_path: Path) -> None:
    """Some writers mark no column as text."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": [b"caf\xc3\xa9?", b"caf\xe9?"], "completion": [b"Yes.", b"No."]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    one, two = read_rows(tmp_path / "rows.parquet")
    assert to_conversation(one.value).turns == (("café?", "Yes."),)
    with pytest.raises(MalformedRowError, match='"prompt" is no Unicode text at character 3'):
        to_conversation(two.value)


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1....")
    with pytest.raises(InputError, match=r"rows.parquet: Parquet is read by pyarrow, .* pip install pyarrow"):
        read_rows(tmp_path / "rows.parquet")
