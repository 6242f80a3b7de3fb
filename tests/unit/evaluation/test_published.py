"""Benchmarks' items as published: questions and answers without the words of any prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from ultrafuser_mega.cleaning import BenchmarkText
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.published import published_items

PROMPT = (
    "from typing import List\n\n\ndef near(values: List[float]) -> bool:\n"
    '    """ Are any two values closer than one?\n    >>> near([1.0, 1.5])\n    True\n    """\n'
)
AGIEVAL = {"passage": "Look. ", "question": "2+2?", "options": ["(A)2", "(B)4"], "label": "B"}
FILES = {
    "gsm8k_test.jsonl": {"question": "2 and 2?", "answer": "2+2=4\n#### 4"},
    "agieval_sat-math.jsonl": {**AGIEVAL, "other": {"solution": "Add."}},
    "agieval_aqua-rat.jsonl": {**AGIEVAL, "passage": None},
    "agieval_math.jsonl": {"question": "Half?", "answer": "1/2", "other": {"solution": "Halve."}},
    "alpaca_eval_instructions.jsonl": {"instruction": "Hi"},
    "mt_bench_question.jsonl": {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    "my_own.jsonl": {"messages": [{"role": "user", "content": "Mine?"}, {"role": "assistant", "content": "Yours."}]},
}


def test_every_benchmark_of_the_papers_tables_and_any_other_file(tmp_path: Path) -> None:
    for name, row in FILES.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    human = {
        "task_id": "HumanEval/0",
        "prompt": PROMPT,
        "entry_point": "near",
        "test": "",
        "canonical_solution": "    x\n",
    }
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(human).encode()))
    (tmp_path / "TruthfulQA.csv").write_text("Question,Correct Answers,Incorrect Answers\nWhy?,Because; So,No reason\n")
    (tmp_path / "README.md").write_text("About these files.\n")
    assert set(published_items([tmp_path])) == {
        BenchmarkText("gsm8k", "gsm8k/1", "2 and 2?", "2+2=4\n#### 4"),
        BenchmarkText("sat_math", "sat_math/1", "Look.  2+2?", "Add."),
        BenchmarkText("aqua", "aqua/1", " 2+2?"),
        BenchmarkText("math", "math/1", " Half?", "Halve."),
        BenchmarkText("alpacaeval", "alpacaeval/1", "Hi"),
        BenchmarkText("mt_bench", "mt_bench/1.1", "Write."),
        BenchmarkText("mt_bench", "mt_bench/1.2", "Again."),
        BenchmarkText("my_own", "my_own/1", "Mine?", "Yours."),
        BenchmarkText("humaneval", "humaneval/1", "Are any two values closer than one?\n", "    x\n"),
        BenchmarkText("truthfulqa", "truthfulqa/1", "Why?"),
    }
    assert published_items([tmp_path / "my_own.jsonl"]) == [BenchmarkText("my_own", "my_own/1", "Mine?", "Yours.")]


def test_a_question_without_an_answer_is_an_item(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Who?"}\n')
    assert published_items([tmp_path / "asked.jsonl"]) == [BenchmarkText("asked", "asked/1", "Who?")]


def test_what_holds_no_items_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "Who?"}\n')
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "Who?"}\n')
    (tmp_path / "empty").mkdir()
    for place, said in (
        ("odd.jsonl", "odd.jsonl:1: unknown shape"),
        ("gsm8k_test.jsonl", "gsm8k_test.jsonl:1: answer is missing"),
        ("empty", "no benchmark file in it"),
        ("nowhere", "no such file or folder"),
    ):
        with pytest.raises(InputError, match=said):
            published_items([tmp_path / place])
