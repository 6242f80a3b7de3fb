"""AGIEval's (Zhong et al. 2023) SAT-Math, AQuA-RAT (Ling et al. 2017) and 1,000 of MATH (Hendrycks et al. 2021).

Multiple choice is asked in AGIEval's own zero-shot words, which want a letter; MATH's problems stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.answers import find_choice, find_formula, same_formula
from ultrafuser_mega.evaluation.benchmark import Item, Score
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark

_LETTERS = "ABCDEFG"
_ORIGIN = "https://github.com/ruixiangcui/AGIEval, data/v1"


class _Choice(JsonlBenchmark):
    domain = "math"
    metric = "Acc"
    fields = {"question": str, "options": list, "label": str}  # noqa: RUF012

    def item(self, row: dict[str, Any], number: int) -> Item:
        options = row["options"]
        letters = _LETTERS[: len(options)]
        if not all(isinstance(option, str) for option in options) or not 2 <= len(options) <= len(_LETTERS):
            raise ValueError(f"options must be 2 to {len(_LETTERS)} texts, not {options}")
        if len(row["label"]) != 1 or row["label"] not in letters:
            raise ValueError(f"label {row['label']!r} is none of {letters}")
        if not isinstance(row.get("passage"), str | None):
            raise ValueError(f"passage must be a text, not {row['passage']!r}")
        question = f"{row.get('passage') or ''}Q: {row['question']} Answer Choices: {' '.join(options)}"
        ask = f"{question}\nA: Among A through {letters[-1]}, the answer is"
        return Item(f"{self.name}/{number}", (ask,), {"label": row["label"], "letters": letters})

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        found = find_choice(replies[0], item.reference["letters"])
        if found is None:
            return Score(0.0, None, "no letter")
        return Score(float(found.value == item.reference["label"]), found.value, found.rule)


class SatMath(_Choice):
    """SAT-Math: four choices."""

    name = "sat_math"
    title = "SAT-Math"
    source = "agieval_sat-math.jsonl"
    origin = f"{_ORIGIN}/sat-math.jsonl"


class Aqua(_Choice):
    """AQuA-RAT's test questions: five choices."""

    name = "aqua"
    title = "AQuA"
    source = "agieval_aqua-rat.jsonl"
    origin = f"{_ORIGIN}/aqua-rat.jsonl"


class Math(JsonlBenchmark):
    """MATH: the formula that the reply comes to must be equivalent to the solution's."""

    name = "math"
    title = "MATH"
    domain = "math"
    metric = "Pass@1"
    source = "agieval_math.jsonl"
    origin = f"{_ORIGIN}/math.jsonl"
    fields = {"question": str, "answer": str}  # noqa: RUF012

    def items(self, data: Path) -> list[Item]:
        if find_spec("math_verify") is None:
            raise InputError("math: math-verify is not installed; pip install 'ultrafuser_mega[evaluation]'")
        return super().items(data)

    def item(self, row: dict[str, Any], number: int) -> Item:
        if not row["answer"].strip():
            raise ValueError("answer is empty")
        return Item(f"math/{number}", (row["question"],), row["answer"])

    def score(self, item: Item, replies: Sequence[str]) -> Score:
        found = find_formula(replies[0])
        if found is None:
            return Score(0.0, None, "no formula")
        return Score(float(same_formula(found.value, item.reference)), found.value, found.rule)
