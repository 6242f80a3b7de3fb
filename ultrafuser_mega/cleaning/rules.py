"""The rules by which rows are removed: their names, what they mean, and what about them can be set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ultrafuser_mega.errors import InputError

MALFORMED, CONTAMINATED, EXACT, NEAR = "malformed", "contaminated", "exact_duplicate", "near_duplicate"

#: Rule -> what it removes, in the order in which they are asked: a row counts for the first that removes it.
RULES: Mapping[str, str] = MappingProxyType(
    {
        MALFORMED: "a row that `ultrafuser prepare` could not read either",
        "length": "a reply with fewer or more words than asked for",
        "refusal": "a reply that begins by declining to answer",
        "boilerplate": "what a model says of itself, marks of a prompt's template, places left to fill in",
        "repetition": "a reply that goes round in circles",
        "language": "a reply in another language than those asked for",
        "code": "Python that does not parse",
        "form": "a reply without the form that the question asks for: JSON, yes or no, a box, a program",
        CONTAMINATED: "a row that holds a benchmark's item",
        EXACT: "a question that was asked before, word by word",
        NEAR: "a question that was nearly asked before",
    }
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which rules are asked, and how.

    Attributes:
        without: names of those that are not.
        min_words, max_words: of every trained reply.
        languages: that replies may be in, by their ISO 639-1 codes; none: any.
        near: similarity from which on a question is nearly another, see duplicates.py.
        compared: what is a duplicate: the same questions whatever the replies, or the same conversation.

    Raises:
        InputError: an unknown rule, or numbers that exclude everything.
    """

    without: frozenset[str] = field(default_factory=frozenset)
    min_words: int = 1
    max_words: int = 4000
    languages: tuple[str, ...] = ()
    near: float = 0.7
    compared: Literal["question", "conversation"] = "question"

    def __post_init__(self) -> None:
        for name in sorted(self.without):
            if name not in RULES or name == MALFORMED:
                raise InputError(f"rule {name!r}: expected one of {', '.join(list(RULES)[1:])}")
        if not 0 <= self.min_words <= self.max_words:
            raise InputError(f"replies of {self.min_words} to {self.max_words} words: expected 0 or more, least first")
        if not 0 < self.near <= 1:
            raise InputError(f"near duplicates: similarity {self.near}; expected a number above 0, at most 1")
        if self.compared not in ("question", "conversation"):
            raise InputError(f"compared is {self.compared!r}; expected question or conversation")

    def asks(self, name: str) -> bool:
        """Whether the rule of this name is asked."""
        return name not in self.without


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a row is removed: the rule, and what it met, in words."""

    rule: str
    why: str
