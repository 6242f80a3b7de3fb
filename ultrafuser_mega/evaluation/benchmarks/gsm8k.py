"""GSM8K (Cobbe et al. 2021): grade-school word problems whose answer is a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ultrafuser_mega.evaluation.answers import find_number, same_number
from ultrafuser_mega.evaluation.benchmark import Item, Score
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark


class Gsm8k(JsonlBenchmark):
    """The question alone; the number that the reply comes to must be the solution's."""

    name = "gsm8k"
    title = "GSM8K"
    domain = "math"
    metric = "Pass@1"
    source = "gsm8k_test.jsonl"
    origin = "https://github.com/openai/grade-school-math, grade_school_math/data/test.jsonl"
    fields = {"question": str, "answer": str}  # noqa: RUF012

    def item(self, row: dict[str, Any], number: int) -> Item:
        _, mark, answer = row["answer"].rpartition("####")
        if not mark or not answer.strip():
            raise ValueError(f"answer does not end in '#### NUMBER' but in {row['answer'][-30:]!r}")
        return Item(f"gsm8k/{number}", (row["question"],), answer.strip())

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        return number_score(replies[0], item.reference)


def number_score(reply: str, wanted: str) -> Score:
    """Whether the number that ``reply`` comes to is ``wanted``."""
    found = find_number(reply)
    if found is None:
        return Score(0.0, None, "no number")
    return Score(float(same_number(found.value, wanted)), found.value, found.rule)
