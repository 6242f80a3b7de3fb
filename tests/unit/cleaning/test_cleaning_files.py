"""Files into a folder: every shape and format, lines as they were, the same whatever the number of processes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.cleaning import Benchmarks, BenchmarkText, Rules
from ultrafuser_mega.cleaning.files import Source, clean_files
from ultrafuser_mega.errors import InputError

pytest.importorskip("rensa")

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Po."}]},
    {"conversations": [{"from": "human", "value": "Name a hill."}, {"from": "gpt", "value": "The Palatine."}]},
    {"instruction": "Name a city", "input": "in Italy", "output": "Rome."},
    {"question": "Name a lake.", "answer": "Garda."},
    {"prompt": "Name a sea.", "completion": "I'm sorry, but I cannot help."},
    {
        "prompt": [{"role": "user", "content": "Name a bay."}],
        "completion": [{"role": "assistant", "content": "Naples."}],
    },
    {"question": "Name a lake!", "answer": "Como."},
]


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_shapes_in_all_formats(tmp_path: Path) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/b").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "in/a/rows.jsonl").write_text(lines)
    (tmp_path / "in/a/rows.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "in/b/rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    files = [tmp_path / "in/a/rows.jsonl", tmp_path / "in/a/rows.json", tmp_path / "in/b/rows.jsonl.gz"]
    sources = [Source(path, path.parent.name) for path in files]
    report = clean_files(sources, tmp_path / "out", Rules(without=frozenset({"near_duplicate"})), processes=1)
    kept = [ROWS[place] for place in (0, 1, 2, 3, 5)]
    assert read_lines(tmp_path / "out/kept/a/rows.jsonl") == kept
    assert read_lines(tmp_path / "out/kept/a/rows.json.jsonl") == []  # all of them stand in the first file
    assert read_lines(tmp_path / "out/kept/b/rows.jsonl") == []
    removed = read_lines(tmp_path / "out/removed.jsonl")
    assert [(one["rule"], one["number"], one["row"]) for one in removed[:2]] == [
        ("refusal", 5, ROWS[4]),
        ("exact_duplicate", 7, ROWS[6]),
    ]
    assert len(removed) == 3 * len(ROWS) - len(kept)
    assert report.read == {"a": 14, "b": 7} and report.kept == {"a": 5}
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written.pop("files")[1] == {"file": "kept/a/rows.json.jsonl", "class": "a", "from": str(files[1])}
    assert written == report.as_json()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_lines_stay_as_they_are_byte_by_byte(tmp_path: Path) -> None:
    odd = '{ "question" : "Wie hei\\u00dft der See?",   "answer": "Königssee", "id": 1.50, "id": 2 }'
    (tmp_path / "rows.jsonl").write_text(f'\n{odd}\r\n{{"broken": \n{{"question": "Who?"}}\n')
    clean_files([Source(tmp_path / "rows.jsonl")], tmp_path / "out", Rules(), processes=1)
    assert (tmp_path / "out/kept/rows.jsonl").read_bytes() == odd.encode() + b"\n"
    broken, lacking = read_lines(tmp_path / "out/removed.jsonl")
    assert broken["text"] == '{"broken":' and "bad JSON" in broken["why"] and broken["rule"] == "malformed"
    assert lacking["row"] == {"question": "Who?"} and 'missing field "answer"' in lacking["why"]


def test_parquet_and_a_files_own_names_for_fields(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"query": ["Name a lake.", "Name a sea."], "reply": ["Garda.", "I cannot help."]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = Source(tmp_path / "rows.parquet", "text", {"question": "query", "answer": "reply"})
    clean_files([source], tmp_path / "out", Rules(), processes=1)
    assert read_lines(tmp_path / "out/kept/rows.jsonl") == [{"query": "Name a lake.", "reply": "Garda."}]


@pytest.mark.timeout(60)
def test_several_processes_write_what_one_does(tmp_path: Path) -> None:
    rows = [{**ROWS[3], "question": f"Name lake {n % 400} of the few that you know of."} for n in range(1500)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = Benchmarks([BenchmarkText("lakes", "lakes/1", "Name lake 7 of the few that you know of.")])
    for processes in (1, 2):
        source = Source(tmp_path / "rows.jsonl", "lakes")
        clean_files([source], tmp_path / f"out{processes}", Rules(), benchmarks, processes=processes)
    first, second = (sorted(path for path in (tmp_path / f"out{n}").rglob("*") if path.is_file()) for n in (1, 2))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    rules = {one["rule"] for one in read_lines(tmp_path / "out1/removed.jsonl")}
    assert rules == {"contaminated", "exact_duplicate"}
    assert len(read_lines(tmp_path / "out1/matches.jsonl")) > 1


def test_what_is_wrong_ends_it_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS)[:-9])
    (tmp_path / "there").mkdir()
    good, bad = Source(tmp_path / "rows.jsonl"), Source(tmp_path / "rows.json")
    for sources, out, said in (
        ([], "out", "no file to clean"),
        ([good], "there", "exists already"),
        ([good, good], "out", "named twice"),
        ([good, Source(tmp_path / "no.jsonl")], "out", "no.jsonl"),
        ([good, bad], "out", "bad JSON"),
    ):
        with pytest.raises(InputError, match=said):
            clean_files(sources, tmp_path / out, Rules(), processes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.jsonl", "there"]


@pytest.mark.timeout(60)
def test_a_process_that_the_system_ends_is_told_in_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "Deep?", "answer": "Yes."}\n')
    monkeypatch.setattr("ultrafuser_mega.cleaning.files._examine", lambda cleaner, batch: os._exit(9))
    with pytest.raises(InputError, match="one of 2 processes that examine rows was ended from outside"):
        clean_files([Source(tmp_path / "a.jsonl")], tmp_path / "out", Rules(), processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_every_file_has_a_name_of_its_own_for_what_is_kept(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    questions = ["Where is the lake of Garda?", "What grows beside a vineyard?", "Who wrote the long letter?"]
    first, second, third = ({"question": question, "answer": "It is in the north."} for question in questions)
    parquet.write_table(pyarrow.Table.from_pylist([first]), tmp_path / "a.json.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(second) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([third]))
    sources = [Source(tmp_path / name) for name in ("a.json.parquet", "a.jsonl", "a.json")]
    clean_files(sources, tmp_path / "out", Rules(), processes=1)
    kept = {path.name: read_lines(path) for path in (tmp_path / "out/kept").iterdir()}
    assert kept == {"a.json.jsonl": [first], "a.jsonl": [second], "a.json.2.jsonl": [third]}
