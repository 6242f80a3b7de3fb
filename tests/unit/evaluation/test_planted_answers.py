"""HumanEval end to end on problems of our own: ten right answers pass, forty planted wrong ones do not; and programs
drawn at random neither hang nor stay."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from random_programs import random_program

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmarks.humaneval import HumanEval
from ultrafuser_mega.evaluation.bubblewrap import Bubblewrap
from ultrafuser_mega.evaluation.programs import ProgramTest, Verdict, check_program
from ultrafuser_mega.evaluation.sandbox import Limits

#: signature, docstring, right body, tests, wrong bodies.
PROBLEMS: list[tuple[str, str, str, str, list[str]]] = [
    (
        "add(a, b)",
        "The sum.",
        "return a + b",
        "assert c(2, 3) == 5; assert c(-1, 1) == 0",
        ["return a - b", "print(a + b)", "return str(a + b)", "return a +"],
    ),
    (
        "largest(xs)",
        "The largest of a list, None of an empty one.",
        "return max(xs) if xs else None",
        "assert c([3, 9, 2]) == 9; assert c([-5, -2]) == -2; assert c([]) is None",
        ["return max(xs)", "return xs[0] if xs else None", "return max(0, *xs)", "return sorted(xs)"],
    ),
    (
        "is_palindrome(text)",
        "Whether text reads the same backwards.",
        "return text == text[::-1]",
        "assert c('abba') is True; assert c('abc') is False; assert c('') is True",
        ["return text[0] == text[-1]", "return text is text[::-1]", "return True", "return text == reversed(text)"],
    ),
    (
        "factorial(n)",
        "n!",
        "return 1 if n < 2 else n * factorial(n - 1)",
        "assert [c(n) for n in range(6)] == [1, 1, 2, 6, 24, 120]",
        ["return n * factorial(n - 1)", "return 0 if n < 2 else n * factorial(n - 1)", "return n ** n", "return 120"],
    ),
    (
        "vowels(text)",
        "How many vowels text has, capital ones as well.",
        "return sum(letter in 'aeiou' for letter in text.lower())",
        "assert c('Education') == 5; assert c('rhythm') == 0",
        [
            "return sum(letter in 'aeiou' for letter in text)",
            "return len(set('aeiou') & set(text.lower())) + 1",
            "return text.count('aeiou')",
            "raise SystemExit(0)",
        ],
    ),
    (
        "flatten(rows)",
        "All numbers of a list of lists.",
        "return [x for row in rows for x in row]",
        "assert c([[1, 2], [], [3]]) == [1, 2, 3]",
        [
            "return rows",
            "return [x for x in row for row in rows]",
            "return {x for row in rows for x in row}",
            "return (x for row in rows for x in row)",
        ],
    ),
    (
        "collatz(n)",
        "How many steps lead from n to 1.",
        "return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)",
        "assert c(1) == 0; assert c(6) == 8",
        [
            "return 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)",
            "return 0 if n == 1 else collatz(n // 2 if n % 2 == 0 else 3 * n + 1)",
            "return 8",
            "while n != 0: n = n // 2 if n % 2 == 0 else 3 * n + 1",
        ],
    ),
    (
        "count(words)",
        "word -> how often it is there.",
        "return {word: words.count(word) for word in words}",
        "assert c(['a', 'b', 'a']) == {'a': 2, 'b': 1}; assert c([]) == {}",
        [
            "return len(words)",
            "return {word: 1 for word in words}",
            "return [(word, words.count(word)) for word in words]",
            "import collections\n    return collections.counter(words)",
        ],
    ),
    (
        "root(x)",
        "The square root.",
        "return math.sqrt(x)",
        "assert abs(c(2.0) - 2 ** 0.5) < 1e-9; assert abs(c(9) - helper(1)) < 1e-9",
        ["return math.isqrt(int(x))", "return x / 2", "return cmath.sqrt(x)", "return helper(x)"],
    ),
    (
        "middle(xs)",
        "The median.",
        "ys = sorted(xs)\n    n = len(ys)\n    return ys[n // 2] if n % 2 else (ys[n // 2 - 1] + ys[n // 2]) / 2",
        "assert c([9, 1, 2]) == 2; assert c([4, 1, 2, 9]) == 3",
        ["return xs[len(xs) // 2]", "return sum(xs) / len(xs)", "return max(xs)", "import os; os._exit(0)"],
    ),
]  # fmt: skip
HEADER = "import math\n\n\ndef helper(x):\n    return 3 * x\n\n\n"


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> None:
    try:
        Bubblewrap().check()
    except InputError as error:
        pytest.skip(str(error))


def quick_check(program: str, test: ProgramTest) -> Verdict:
    return check_program(program, test, Limits(seconds=60.0, cpu_seconds=1, memory_bytes=512 << 20))


def test_right_answers_pass_and_forty_planted_wrong_ones_do_not(tmp_path: Path) -> None:
    rows = []
    for signature, docstring, _, tests, _ in PROBLEMS:
        name = signature.split("(")[0]
        prompt = f'{HEADER}def {signature}:\n    """{docstring}"""\n'
        test = f"def check(c):\n    {tests}\n"
        rows.append({"task_id": name, "prompt": prompt, "entry_point": name, "test": test})
    with gzip.open(tmp_path / HumanEval.source, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    benchmark = HumanEval(quick_check)
    items = benchmark.items(tmp_path)
    assert items[0].turns == ("Write a function add(a, b) to solve the following problem:\nThe sum.",)
    forms = ("```python\ndef {}:\n    {}\n```", "Sure:\n\ndef {}:\n    {}\n\nThat is it.")
    passed = {
        (signature, body): benchmark.score(item, [forms[place % 2].format(signature, body)]).value
        for item, (signature, _, right, _, wrong) in zip(items, PROBLEMS, strict=True)
        for place, body in enumerate([right, *wrong])
    }
    assert len(passed) == 50
    right_ones = {(signature, right) for signature, _, right, _, _ in PROBLEMS}
    assert {place for place, value in passed.items() if value == 1.0} == right_ones


def test_random_programs_neither_hang_nor_pass_by_a_trick() -> None:
    double = ProgramTest("double", "", "def check(c):\n    for x in (0, 3, -5):\n        assert c(x) == 2 * x\n")
    limits = Limits(seconds=4.0, cpu_seconds=1, memory_bytes=256 << 20)
    for seed in range(24):
        program, may_be_right = random_program(seed)
        verdict = check_program(program, double, limits)
        assert may_be_right or not verdict.passed, program
