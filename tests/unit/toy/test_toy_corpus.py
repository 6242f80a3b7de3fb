"""The generated instruction data: repeatable, properly split, and right in what it says."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import code_tasks, crossing_tasks, math_tasks
from ultrafuser_mega.toy.corpus import CLASSES, generate, read_jsonl, write_jsonl

SQL_TASKS = (code_tasks._sql_select, code_tasks._sql_group, code_tasks._sql_change)
NOT_PYTHON = (*SQL_TASKS, code_tasks._shell, code_tasks._explain)
PYTHON_TASKS = tuple(task for task in code_tasks.TASKS if task not in NOT_PYTHON)


@pytest.mark.parametrize("name", CLASSES)
def test_same_seed_gives_the_same_bytes_and_another_seed_other_rows(name: Any, tmp_path: Path) -> None:
    for path, seed in ((tmp_path / "a", 3), (tmp_path / "b", 3), (tmp_path / "c", 4)):
        write_jsonl(path, generate(name, seed=seed, train_rows=300, heldout_rows=30).train)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("name", CLASSES)
def test_no_instruction_occurs_twice_in_or_across_the_splits(name: Any) -> None:
    split = generate(name, seed=0, train_rows=4000, heldout_rows=200)
    assert (len(split.train), len(split.heldout)) == (4000, 200)
    assert len({row.instruction for row in split.train + split.heldout}) == 4200


@pytest.mark.parametrize("name", CLASSES)
def test_every_row_says_something_and_reads_back_as_written(name: Any, tmp_path: Path) -> None:
    rows = generate(name, seed=1, train_rows=1000, heldout_rows=0).train
    assert all(row.instruction.strip() == row.instruction and row.output.strip() == row.output != "" for row in rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_asking_for_more_rows_than_the_grammar_has_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser_mega.toy.corpus._TASKS", {"code": (code_tasks._explain,)})
    with pytest.raises(InputError, match=r"train_rows \+ heldout_rows = 1000: the code grammar gave only 300 "):
        generate("code", seed=0, train_rows=900, heldout_rows=100)


@pytest.mark.parametrize("task", PYTHON_TASKS, ids=lambda task: task.__name__)
def test_python_answers_are_python(task: Any) -> None:
    rng = Random(0)
    for _ in range(200):
        _, answer = task(rng)
        compile(answer, "answer", "exec")


@pytest.mark.parametrize("task", SQL_TASKS, ids=lambda task: task.__name__)
def test_sql_answers_run(task: Any) -> None:
    database = sqlite3.connect(":memory:")
    columns = ", ".join(sorted({*code_tasks.COLUMNS, *code_tasks.NUMERIC}))
    for table in code_tasks.TABLES:
        database.execute(f"CREATE TABLE {table} ({columns})")
    rng = Random(0)
    for _ in range(200):
        database.executescript(task(rng)[1])


@pytest.mark.parametrize("task", (*math_tasks.TASKS, *crossing_tasks.TASKS["math"]), ids=lambda task: task.__name__)
def test_every_calculation_in_a_math_answer_is_right(task: Any) -> None:
    rng = Random(0)
    for _ in range(200):
        _, answer = task(rng)
        for left, right in re.findall(r"((?:\d+ [-+*/] )+\d+) = (-?\d+)(?!\d)", answer):
            assert eval(left) == int(right), answer
