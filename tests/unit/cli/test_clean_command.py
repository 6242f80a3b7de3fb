"""``ultrafuser clean`` and ``ultrafuser look`` as people call them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support.command import ultrafuser

pytest.importorskip("rensa")

ROWS = [
    {"question": "Name a lake.", "answer": "Garda."},
    {"question": "Name a lake!", "answer": "Como."},
    {"question": "Name the sea between Italy and Croatia.", "answer": "The Adriatic."},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_from_rows_to_a_page(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "seas.jsonl").write_text('{"question": "Name the sea between Italy and Croatia."}\n')
    out, page = tmp_path / "out", tmp_path / "page.html"
    asked = ["--benchmarks", tmp_path / "seas.jsonl", "--out", out, "--processes", 1]
    assert ultrafuser(monkeypatch, "clean", f"water={rows}", *asked) == 0
    said = capsys.readouterr().out
    assert f"kept 1 of 3 rows: {out}" in said and "100% of the question of seas/1" in said
    assert (out / "kept/rows.jsonl").read_bytes() == rows.read_bytes().splitlines(keepends=True)[0]
    assert ultrafuser(monkeypatch, "look", out, "--out", page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert '"of": "water"' in page.read_text()


def test_the_training_files_of_a_configuration(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_text(rows.read_text().replace("question", "query"))
    names = {"question": "query", "answer": "answer"}
    data = {"root": str(tmp_path), "classes": {"water": {"train": ["rows.jsonl"], "columns": {"rows.jsonl": names}}}}
    specialists = {"water": {"path": str(tmp_path), "template": "hf"}}
    stages = {
        "stage1": {"steps": 1, "samples_per_class": 1, "lr": 1e-3},
        "stage2": {"steps": 0, "samples_per_class": 1, "lr": 1e-3},
    }
    config = {"name": "x", "data": data, "specialists": specialists, "layouts": [{"kind": "colocated"}], **stages}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    code = ultrafuser(
        monkeypatch, "clean", "--config", tmp_path / "my.yaml", "--out", tmp_path / "out", "--processes", 1
    )
    assert code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"] == {"water": {"read": 3, "kept": 2}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "clean: name files"),
        (("rows.jsonl", "--config", "my.yaml"), "and not both"),
        (("nowhere.jsonl",), "nowhere.jsonl: no such file"),
        (("rows.jsonl", "--without", "speling"), "rule 'speling'"),
        (("rows.jsonl", "--language", "xx-large"), "language 'xx-large'"),
        (("rows.jsonl", "--benchmarks", "nowhere"), "nowhere: no such file or folder"),
        (("rows.jsonl", "--benchmarks", "rows.jsonl", "--rule", "some"), "expected share or any"),
    ],
)
def test_bad_input_is_one_line(
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(rows.parent)
    assert ultrafuser(monkeypatch, "clean", *arguments, "--out", "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.timeout(120)
def test_a_killed_command_leaves_no_process_and_no_folder_of_its_name(rows: Path, tmp_path: Path) -> None:
    line = rows.read_text()
    rows.write_text("".join(line.replace("lake", f"lake {n}") for n in range(60_000)))
    program = "from ultrafuser_mega.cli import main; main()"
    command = [sys.executable, "-c", program, "clean", str(rows), "--out", str(tmp_path / "out"), "--processes", "2"]
    process = subprocess.Popen(command)
    children: list[psutil.Process] = []
    while len(children) < 2:
        assert process.poll() is None
        children = psutil.Process(process.pid).children()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive and len(gone) == 2
    assert not (tmp_path / "out").exists()
