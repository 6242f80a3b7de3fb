"""The answer in what a model wrote, by published rules, and whether it is the right one.

Every rule has a name, which the result keeps; they are tried in the order given, and the first that finds something
decides, right or wrong:

    "####"         what follows the last "####": the form of GSM8K's own solutions (Cobbe et al. 2021)
    "boxed"        the last \\boxed{...} or \\fbox{...}, braces within braces included: MATH (Hendrycks et al. 2021)
    "answer is"    what follows the last "answer is" or "answer:": WizardMath, AGIEval's chains of thought
    "brackets"     the last letter in brackets (choices): AGIEval
    "begins"       a letter that the text begins with, before a bracket, a point or a colon (choices)
    "last number"  lm-evaluation-harness' "flexible-extract" of gsm8k
    "last formula" the last $...$, \\(...\\) or \\[...\\]

Numbers are equal as fractions, choices as letters, formulas by math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = re.compile(
    r"(?<![\w.])[-\u2212+]?\s?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:\s?/\s?\d+(?![\d.]))?"
)
_LATEX_FRACTION = re.compile(r"([-\u2212]?)\\[dt]?frac\s*\{\s*([-\u2212]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_ANSWER_IS = re.compile(
    r"answer(?:\s+to\s+[^.\n:]{0,60})?\s*(?:\*\*|__)?\s*(?:\s(?:is|are|would\s+be|=)|:)", re.IGNORECASE
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What was found, as text, and by which rule."""

    value: str
    rule: str


def find_number(text: str) -> Answer | None:
    """The last word of ``text`` about a number; as "3", "-0.5" or "3/4"."""
    for rule, part in _places(text, "####", "boxed", "answer is"):
        if (number := _first_number(part)) is not None:
            return Answer(number, rule)
    numbers = _numbers(text)
    return Answer(numbers[-1], "last number") if numbers else None


def find_choice(text: str, letters: str) -> Answer | None:
    """The letter of ``letters`` that ``text`` chooses."""
    bracketed = re.compile(rf"[(\[]\s*([{letters}])\s*[)\]]")
    alone = re.compile(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])")
    for rule, part in _places(text, "####", "boxed", "answer is"):
        beginning = part[:60].split("\n\n")[0]
        if found := bracketed.search(beginning) or alone.search(re.sub(r"\\[a-z]+", " ", beginning)):
            return Answer(found[1], rule)
    if every := bracketed.findall(text):
        return Answer(every[-1], "brackets")
    if found := re.match(rf"\s*(?:\*\*)?([{letters}])(?:\*\*)?(?:[).:,]|\s*$|\s*\n)", text):
        return Answer(found[1], "begins")
    return None


def find_formula(text: str) -> Answer | None:
    """What ``text`` says that the answer is, as LaTeX or plain arithmetic."""
    for rule, part in _places(text, "boxed", "answer is"):
        formula = _FORMULA.search(part) if rule == "answer is" else None
        value = next(filter(None, formula.groups())) if formula else part.split("\n")[0]
        if value := value.strip().rstrip(".").strip():
            return Answer(value, rule)
    if every := _FORMULA.findall(text):
        return Answer(next(filter(None, every[-1])).strip(), "last formula")
    numbers = _numbers(text)
    return Answer(numbers[-1], "last number") if numbers else None


def same_number(value: str, wanted: str) -> bool:
    """Whether two texts name one number."""
    mine, theirs = _fraction(value), _fraction(wanted)
    return mine is not None and mine == theirs


def same_formula(value: str, wanted: str) -> bool:
    """Whether two formulas are equivalent, as math-verify sees it: its parser, its rounding, its sympy.

    Call it in the main thread: a formula that takes sympy longer than 5 s is another, and a signal says when.
    """
    from math_verify import parse, verify

    return bool(verify(*(parse(f"${text[:300]}$") for text in (wanted, value))))


def _places(text: str, *rules: str) -> list[tuple[str, str]]:
    """(rule, where it looks) for those that find their mark in ``text``."""
    found = ((rule, _MARKS[rule](text)) for rule in rules)
    return [(rule, part) for rule, part in found if part is not None]


def _behind_hashes(text: str) -> str | None:
    _, mark, behind = text.rpartition("####")
    return behind if mark else None


def _boxed(text: str) -> str | None:
    """What the last box holds; None where it is not closed."""
    begin = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    opened = text.find("{", begin) if begin >= 0 else -1
    if opened < 0 or text[begin:opened].strip() not in (r"\boxed", r"\fbox"):
        bare = re.match(r"\\boxed\s+(\S+)", text[begin:]) if begin >= 0 else None  # as MATH has it: \boxed 3
        return bare[1].rstrip("$.") if bare else None
    depth = 0
    for at in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if depth == 0:
            return text[opened + 1 : at].strip()
    return None


def _behind_answer_is(text: str) -> str | None:
    found = list(_ANSWER_IS.finditer(text))
    return text[found[-1].end() :].lstrip(" :*_") if found else None


_MARKS: dict[str, Callable[[str], str | None]] = {
    "####": _behind_hashes,
    "boxed": _boxed,
    "answer is": _behind_answer_is,
}


def _first_number(text: str) -> str | None:
    numbers = _numbers(text.split("\n\n")[0])
    return numbers[0] if numbers else None


def _numbers(text: str) -> list[str]:
    plain = _LATEX_FRACTION.sub(r"\1\2/\3", text.replace(r"\$", "$").replace("{,}", ",").replace(r"\!", ""))
    return [re.sub(r"[\s$,+]", "", found[0]).replace("\u2212", "-") for found in _NUMBER.finditer(plain)]


def _fraction(value: str) -> Fraction | None:
    numbers = _numbers(value)
    if not numbers:
        return None
    try:
        over, _, under = numbers[0].partition("/")
        return Fraction(over) / Fraction(under or "1")
    except (ValueError, ZeroDivisionError):
        return None
