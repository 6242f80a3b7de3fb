"""Words that more than one toy task draws on: people, goods, days, small numbers spelled out.

The three classes share them on purpose. A gate can only be worth more than a switch when the
specialists know some of the same words and differ in what they say about them.
"""

from __future__ import annotations

from random import Random
from typing import TypeVar

T = TypeVar("T")

NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jonas", "Kim", "Laura",
    "Maya", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tara", "Victor",
)  # fmt: skip

# singular, plural: sold in the shops of the word problems, described in the texts, stored in the tables.
GOODS = (
    ("apple", "apples"), ("book", "books"), ("bottle", "bottles"), ("card", "cards"), ("chair", "chairs"),
    ("cookie", "cookies"), ("flower", "flowers"), ("lamp", "lamps"), ("marble", "marbles"), ("orange", "oranges"),
    ("pencil", "pencils"), ("plant", "plants"), ("shirt", "shirts"), ("stamp", "stamps"), ("ticket", "tickets"),
    ("toy", "toys"),
)  # fmt: skip

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def article(noun: str) -> str:
    """``noun`` with its indefinite article: "an apple", "a book"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def two(rng: Random, choices: tuple[T, ...]) -> tuple[T, T]:
    """Two different members of ``choices``, in random order."""
    first, second = rng.sample(choices, 2)
    return first, second
