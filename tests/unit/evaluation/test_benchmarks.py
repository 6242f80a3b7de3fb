"""Benchmarks: what is asked, what a reply is worth, and what is said of files that are not as published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Item
from ultrafuser_mega.evaluation.benchmarks import SUITES, benchmark, chosen
from ultrafuser_mega.evaluation.benchmarks.truthfulqa import find_judgement
from ultrafuser_mega.evaluation.programs import ProgramTest, Verdict

TRUTHS = (
    "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\r\n"
    'A,M,"What, really?",Yes it is,"It is; It is, too; ","It is not",x\r\n'
    'A,M,Why?,Because,"Because",No reason; None;,x\r\n'
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4,000"}],
    "sat_math": [
        {"passage": "", "question": "2+2?", "options": ["(A)2", "(B)4", "(C)5", "(D)6"], "label": "B"},
        {"passage": "See. ", "question": "3?", "options": ["(A)2", "(B)3"], "label": "B"},
    ],
    "aqua": [{"passage": None, "question": "1+1?", "options": ["(A)2", "(B)4", "(C)5", "(D)6", "(E)7"], "label": "A"}],
    "math": [{"passage": None, "question": "Half?", "options": None, "label": None, "answer": "\\frac{1}{2}"}],
    "alpacaeval": [{"instruction": "Hi", "dataset": "d"}, {"instruction": "Ho", "output": "He"}],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 101, "category": "math", "turns": ["c", "d"], "reference": ["1", "2"]},
        {"question_id": 131, "category": "extraction", "turns": ["e", "f"], "reference": ["3", "4"]},
    ],
    "toy_text": [{"id": 1, "instruction": "Say a b", "check": {"kind": "exact", "answer": "a b"}}],
    "toy_math": [{"id": "m", "instruction": "2*3", "check": {"kind": "number", "answer": "6"}}],
    "toy_code": [
        {
            "id": "c",
            "instruction": "Write f.",
            "check": {"kind": "program", "entry_point": "f", "tests": "def check(candidate): pass"},
        }
    ],
}


def items_of(name: str, folder: Path, rows: Sequence[object] | None = None) -> list[Item]:
    found = benchmark(name)
    lines = "\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in (rows or ROWS[name]))
    (folder / found.source).write_text(lines + "\n")
    return found.items(folder)


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("gsm8k", ["2 and 2?"]),
        (
            "sat_math",
            [
                "Q: 2+2? Answer Choices: (A)2 (B)4 (C)5 (D)6\nA: Among A through D, the answer is",
                "See. Q: 3? Answer Choices: (A)2 (B)3\nA: Among A through B, the answer is",
            ],
        ),
        ("aqua", ["Q: 1+1? Answer Choices: (A)2 (B)4 (C)5 (D)6 (E)7\nA: Among A through E, the answer is"]),
        ("math", ["Half?"]),
        (
            "alpacaeval",
            [
                "Please give helpful, very detailed, and polite answer to the user's question below. \n Question: Hi",
                "Please give helpful, very detailed, and polite answer to the user's question below. \n Question: Ho",
            ],
        ),
        ("toy_text", ["Say a b"]),
    ],
)
def test_what_is_asked(name: str, turns: list[str], tmp_path: Path) -> None:
    assert [item.turns for item in items_of(name, tmp_path)] == [(turn,) for turn in turns]


@pytest.mark.parametrize(
    ("name", "reply", "value", "extracted"),
    [
        ("gsm8k", "It is 4000.", 1.0, "4000"),
        ("gsm8k", "It is 400.", 0.0, "400"),
        ("gsm8k", "None.", 0.0, None),
        ("sat_math", "(B)", 1.0, "B"),
        ("sat_math", " B", 1.0, "B"),
        ("sat_math", "A. 2", 0.0, "A"),
        ("sat_math", "E", 0.0, None),
        ("aqua", "The answer is (A) 2", 1.0, "A"),
        ("math", "It is $0.5$", 1.0, "0.5"),
        ("math", "It is \\boxed{\\frac12}.", 1.0, "\\frac12"),
        ("math", "I do not know", 0.0, None),
        ("alpacaeval", "Hi!", None, None),
        ("mt_bench", "Hi!", None, None),
        ("toy_text", "a b\n", 1.0, "a b"),
        ("toy_text", "a b c", 0.0, "a b c"),
        ("toy_math", "so 6", 1.0, "6"),
    ],
)
def test_what_a_reply_is_worth(
    name: str, reply: str, value: float | None, extracted: str | None, tmp_path: Path
) -> None:
    score = benchmark(name).score(items_of(name, tmp_path)[0], [reply, reply])
    assert (score.value, score.extracted) == (value, extracted)


def test_mt_bench_shows_references_where_fastchat_does(tmp_path: Path) -> None:
    items = items_of("mt_bench", tmp_path)
    assert [(item.id, item.category, item.reference) for item in items] == [
        ("mt_bench/81", "writing", None),
        ("mt_bench/101", "math", ["1", "2"]),
        ("mt_bench/131", "extraction", None),
    ]
    assert items[0].turns == ("a", "b")


def test_truthfulqa_asks_for_every_option_alone(tmp_path: Path) -> None:
    (tmp_path / "TruthfulQA.csv").write_text(TRUTHS, newline="")
    items = benchmark("truthfulqa").items(tmp_path)
    assert items[0].turns == (
        "Judge the correctness of a given answer. Question: What, really?\n Answer: It is\n "
        "Is the answer correct? Return Yes or No.",
    )
    assert [(item.group, item.reference) for item in items] == [
        ("truthfulqa/1", "Yes"),
        ("truthfulqa/1", "Yes"),
        ("truthfulqa/1", "No"),
        ("truthfulqa/2", "Yes"),
        ("truthfulqa/2", "No"),
        ("truthfulqa/2", "No"),
    ]
    assert [benchmark("truthfulqa").score(items[2], [reply]).value for reply in ("No.", "Yes", "Maybe")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("Yes", ("Yes", "begins")),
        ("no, since yes", ("No", "begins")),
        (' "Yes."', ("Yes", "begins")),
        ("**No**", ("No", "begins")),
        ("I would say yes", ("Yes", "only one of both")),
        ("The answer is No. No!", ("No", "only one of both")),
        ("Either yes or no", None),
        ("None of it, nobody knows", None),
        ("", None),
    ],
)
def test_judgements(reply: str, said: tuple[str, str] | None) -> None:
    assert find_judgement(reply) == said


def test_programs_go_to_whoever_runs_them(tmp_path: Path) -> None:
    seen: list[tuple[str, ProgramTest]] = []

    def check(program: str, test: ProgramTest) -> Verdict:
        seen.append((program, test))
        return Verdict(len(seen) == 1, "" if len(seen) == 1 else "wrong answer")

    toy = benchmark("toy_code", check)
    items_of("toy_code", tmp_path)
    (item,) = toy.items(tmp_path)
    scores = [toy.score(item, [f"```\ndef f():\n    return {x}\n```"]) for x in (1, 2)]
    assert [score.value for score in scores] == [1.0, 0.0]
    assert [score.rule for score in scores] == ["fenced function", "fenced function; wrong answer"]
    assert seen[1] == ("def f():\n    return 2", ProgramTest("f", "", "def check(candidate): pass"))


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("gsm8k", "{", r"gsm8k_test.jsonl:3: is no JSON \("),
        ("gsm8k", "[]", r"gsm8k_test.jsonl:3: is no JSON object but \[\]"),
        ("gsm8k", {"question": "?"}, r":3: answer is missing; it must be str"),
        ("gsm8k", {"question": "?", "answer": 4}, r":3: answer is int; it must be str"),
        ("gsm8k", {"question": "?", "answer": "4"}, r":3: answer does not end in '#### NUMBER' but in '4'"),
        ("aqua", {"question": "?", "options": ["a", "b"], "label": "C"}, r":3: label 'C' is none of AB"),
        ("aqua", {"question": "?", "options": ["a", 2], "label": "B"}, r":3: options must be 2 to 7 texts"),
        ("math", {"question": "?", "answer": " "}, r":3: answer is empty"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": ["a"]}, r":3: turns must be two texts"),
        ("mt_bench", ROWS["mt_bench"][0], r"two items have the id 'mt_bench/81'"),
        ("toy_text", {"id": 1, "instruction": "", "check": {"kind": "x"}}, r":3: check.kind 'x' is none of number"),
        ("toy_text", {"id": 1, "instruction": "", "check": {"kind": "exact"}}, r":3: check.answer must be a text"),
        ("toy_text", {"id": 1, "instruction": "", "check": {"kind": ["exact"]}}, r":3: check.kind \['exact'\] is none"),
        (
            "toy_code",
            {"id": 1, "instruction": "", "check": ROWS["toy_code"][0]["check"] | {"setup": 5}},
            r":3: check.setup must be a text, not 5",
        ),
        ("gsm8k", "[" * 100_000, r":3: is no JSON \(maximum recursion depth"),
        ("sat_math", ROWS["sat_math"][0] | {"passage": {}}, r":3: passage must be a text, not \{\}"),
        ("alpacaeval", {"instruction": "Hi", "output": 7}, r":3: output must be the reply to compare with, .* not 7"),
        ("mt_bench", ROWS["mt_bench"][1] | {"reference": ["a", 1]}, r":3: reference must be a text for every turn"),
    ],
)
def test_a_malformed_line_is_named(name: str, row: object, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        items_of(name, tmp_path, [ROWS[name][0], row])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TRUTHS.replace("Correct Answers,Inc", "Right,Inc"), r"csv:1: no column 'Correct Answers' among Type"),
        (TRUTHS.replace('"Because"', '" ; "'), r"TruthfulQA.csv:3: Correct Answers is empty"),
        (TRUTHS + 'A,M,"open', r"TruthfulQA.csv: is no CSV behind line 3 \(unexpected end of data"),
        (TRUTHS.split("\r\n")[0], r"TruthfulQA.csv: holds no item"),
    ],
)
def test_a_malformed_table_is_named(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "TruthfulQA.csv").write_text(text, newline="")
    with pytest.raises(InputError, match=problem):
        benchmark("truthfulqa").items(tmp_path)


@pytest.mark.parametrize("name", [name for suite in SUITES.values() for name in suite.benchmarks])
def test_a_missing_file_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    found = benchmark(name)
    with pytest.raises(InputError) as error:
        found.items(tmp_path)
    assert str(error.value) == (f"{tmp_path / found.source}: no such file; {name} needs it: get it from {found.origin}")


def test_line_separators_within_a_text_do_not_end_its_line(tmp_path: Path) -> None:
    question = "a\u2028b\u2029c\x85d"
    row = json.dumps({"question": question, "answer": "#### 1"}, ensure_ascii=False)
    (one,) = items_of("gsm8k", tmp_path, [row])
    assert one.turns == (question,)


def test_a_packed_file_with_damage_within_is_told(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 20)
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz: is no packed UTF-8 text \(Error -3"):
        benchmark("humaneval").items(tmp_path)


def test_a_file_that_is_not_packed_is_told(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_text("{}")
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz: is no packed UTF-8 text"):
        benchmark("humaneval").items(tmp_path)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "a", "prompt": "x", "entry_point": "f"}'))
    with pytest.raises(InputError, match=r"HumanEval.jsonl.gz:1: test is missing"):
        benchmark("humaneval").items(tmp_path)


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"'mmlu': there is no such .* suites are paper, .* benchmarks truthfulqa, .*toy_math"
    ):
        benchmark("mmlu")


def test_a_part_is_drawn_by_groups_and_is_part_of_a_larger_one() -> None:
    items = [Item(f"{q}/{o}", ("?",), None, group=str(q)) for q in range(20) for o in range(3)]
    five, ten = chosen(items, 5, seed=1), chosen(items, 10, seed=1)
    assert len(five) == 15 and len(ten) == 30 and len({item.group for item in five}) == 5
    assert [item for item in items if item in five] == five and all(item in ten for item in five)
    assert chosen(items, 5, seed=1) == five != chosen(items, 5, seed=2)
    assert chosen(items, None, seed=1) == items == chosen(items, 99, seed=1)
