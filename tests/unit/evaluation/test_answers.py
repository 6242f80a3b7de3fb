"""Answers as models write them, odd ones included, and what the rules make of them."""

from __future__ import annotations

import pytest

from ultrafuser_mega.evaluation.answers import (
    Answer,
    find_choice,
    find_formula,
    find_number,
    same_formula,
    same_number,
)

NUMBERS = [
    ("16 - 3 - 4 = 9 eggs\n#### 18", "18", "####"),
    ("#### -5", "-5", "####"),
    ("#### $1,234.50", "1234.50", "####"),
    ("so 3. #### 18 eggs a day", "18", "####"),
    ("#### 12 \n\n#### 13", "13", "####"),
    ("####", None, None),
    ("Thus \\boxed{42}.", "42", "boxed"),
    ("\\boxed{\\text{It is } 7}", "7", "boxed"),
    ("\\boxed{\\frac{3}{4}}", "3/4", "boxed"),
    ("$\\boxed{-\\dfrac{1}{2}}$", "-1/2", "boxed"),
    ("\\boxed{\\$20{,}000}", "20000", "boxed"),
    ("\\boxed 5$", "5", "boxed"),
    ("\\boxed{1} no, \\boxed{2}", "2", "boxed"),
    ("\\boxed{17 unclosed, 18", "18", "last number"),
    ("The answer is: 42.", "42", "answer is"),
    ("The answer is 1,000 dollars. It took 3 days.", "1000", "answer is"),
    ("**Answer:** 12 apples", "12", "answer is"),
    ("Final answer: $\\$15$", "15", "answer is"),
    ("The answer is 3, no: the answer is 4.", "4", "answer is"),
    ("The answer to the question is 6", "6", "answer is"),
    ("the answer is x = 9", "9", "answer is"),
    ("I had 3 and got 4, which makes 7.", "7", "last number"),
    ("It is 50%.", "50", "last number"),
    ("It costs $3.99.", "3.99", "last number"),
    ("At 3/4 of it", "3/4", "last number"),
    ("1,2,3", "3", "last number"),
    ("version2 has no number of its own", None, None),
    ("about .5", ".5", "last number"),
    ("\u22127 degrees", "-7", "last number"),
    ("no number", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "value", "rule"), NUMBERS)
def test_numbers(text: str, value: str | None, rule: str | None) -> None:
    assert find_number(text) == (None if value is None or rule is None else Answer(value, rule))


CHOICES = [
    ("The answer is (B).", "B", "answer is"),
    ("The answer is B", "B", "answer is"),
    ("Answer: C) because", "C", "answer is"),
    ("the correct answer is **D**.", "D", "answer is"),
    ("\\boxed{\\text{(E)}}", "E", "boxed"),
    ("\\boxed{A}", "A", "boxed"),
    ("#### C", "C", "####"),
    ("(A) is wrong, so it is (D)", "D", "brackets"),
    ("B", "B", "begins"),
    ("B. 12 km", "B", "begins"),
    ("C) 12", "C", "begins"),
    ("[A]", "A", "brackets"),
    ("A car drives", None, None),
    ("None of these", None, None),
    ("I'D say so", None, None),
    ("", None, None),
    ("The answer is 12.\n\nSo A car", None, None),
    ("answer: option E", "E", "answer is"),
]


@pytest.mark.parametrize(("text", "value", "rule"), CHOICES)
def test_choices(text: str, value: str | None, rule: str | None) -> None:
    assert find_choice(text, "ABCDE") == (None if value is None or rule is None else Answer(value, rule))


def test_a_letter_that_is_no_choice_is_none() -> None:
    assert find_choice("The answer is E", "ABCD") is None


FORMULAS = [
    ("so $x = 1$ and \\boxed{\\frac{a}{b^{2}}}", "\\frac{a}{b^{2}}", "boxed"),
    ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}", "boxed"),
    ("The answer is $(3,4]$.", "(3,4]", "answer is"),
    ("The answer is: 2\\sqrt{3}.", "2\\sqrt{3}", "answer is"),
    ("We have \\[x^2\\] and $y$", "y", "last formula"),
    ("It is 5", "5", "last number"),
    ("nothing", None, None),
]


@pytest.mark.parametrize(("text", "value", "rule"), FORMULAS)
def test_formulas(text: str, value: str | None, rule: str | None) -> None:
    assert find_formula(text) == (None if value is None or rule is None else Answer(value, rule))


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        ("18", "18.0", True),
        ("1,000", "1000", True),
        ("3/4", "0.75", True),
        ("0.333", "1/3", False),
        ("-5", "5", False),
        ("$12", "12", True),
        ("7/0", "7", False),
        ("none", "0", False),
    ],
)
def test_numbers_are_compared_as_fractions(value: str, wanted: str, same: bool) -> None:
    assert same_number(value, wanted) is same


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\dfrac12", "\\frac{1}{2}", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("(3,4]", "(3,4]", True),
        ("(3,4)", "(3,4]", False),
        ("x+1", "1+x", True),
        ("\\{2,1\\}", "\\{1,2\\}", True),
        ("50\\%", "50", True),
        ("11", "12", False),
        ("9^{9^{9^{9^{9}}}}", "1", False),
    ],
)
def test_formulas_are_compared_by_meaning(value: str, wanted: str, same: bool) -> None:
    assert same_formula(value, wanted) is same
