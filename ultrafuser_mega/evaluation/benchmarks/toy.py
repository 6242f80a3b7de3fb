"""Tasks of the toy specialists, each of which can be checked: a benchmark per class, in its file ``CLASS.tasks.jsonl``.

A row is {"id": ..., "instruction": ..., "check": {"kind": ...}}, where the check is one of

    {"kind": "number", "answer": "12"}       the number that the reply comes to (answers.py)
    {"kind": "exact", "answer": "..."}       the whole reply, but for white space around it
    {"kind": "program", "entry_point": "f", "tests": "def check(candidate): ...", "setup": ""}
                                             a program as HumanEval wants it; "setup", which may be left out, is the
                                             prompt that a reply completes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrafuser_mega.evaluation.benchmark import Item, Score
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark
from ultrafuser_mega.evaluation.benchmarks.gsm8k import number_score
from ultrafuser_mega.evaluation.benchmarks.humaneval import ProgramCheck, program_score
from ultrafuser_mega.evaluation.programs import ProgramTest, check_program

_CHECKS: dict[str, tuple[str, ...]] = {
    "number": ("answer",),
    "exact": ("answer",),
    "program": ("entry_point", "tests"),
}


class _Toy(JsonlBenchmark):
    metric = "Acc"
    origin = "python tools/make_toy_specialists.py, which writes it with the toy data"
    max_new_tokens = 128
    fields = {"id": (str, int), "instruction": str, "check": dict}  # noqa: RUF012

    def __init__(self, check: ProgramCheck = check_program) -> None:
        self._check = check

    def item(self, row: dict[str, Any], number: int) -> Item:
        check = row["check"]
        kind = check.get("kind")
        if not isinstance(kind, str) or kind not in _CHECKS:
            raise ValueError(f"check.kind {kind!r} is none of {', '.join(_CHECKS)}")
        for name in (*_CHECKS[kind], *({"setup"} & check.keys())):
            if not isinstance(check.get(name), str):
                raise ValueError(f"check.{name} must be a text, not {check.get(name)!r}")
        return Item(str(row["id"]), (row["instruction"],), check)

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        check, reply = item.reference, replies[0]
        if check["kind"] == "number":
            return number_score(reply, check["answer"])
        if check["kind"] == "exact":
            return Score(float(reply.strip() == check["answer"].strip()), reply.strip(), "whole reply")
        test = ProgramTest(check["entry_point"], check.get("setup", ""), check["tests"])
        return program_score(reply, test, self._check)


class ToyText(_Toy):
    """Of the class ``text``."""

    name = "toy_text"
    title = "Toy text"
    domain = "text"
    source = "text.tasks.jsonl"


class ToyCode(_Toy):
    """Of the class ``code``."""

    name = "toy_code"
    title = "Toy code"
    domain = "code"
    runs_programs = True
    source = "code.tasks.jsonl"


class ToyMath(_Toy):
    """Of the class ``math``."""

    name = "toy_math"
    title = "Toy math"
    domain = "math"
    source = "math.tasks.jsonl"
