"""Which instruction is there already: in the same words, or in nearly the same."""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

_WORD = re.compile(r"\w+")


class Duplicates(Protocol):
    """Texts by key."""

    def match(self, text: str) -> str | None:
        """The key of a text that this one repeats."""

    def add(self, key: str, text: str) -> None:
        """A text more."""


class SameWords:
    """Texts whose words are the same, whatever their case and what stands between them.

    A text of signs alone is compared as it is.
    """

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def match(self, text: str) -> str | None:
        return self._keys.get(normalised(text))

    def add(self, key: str, text: str) -> None:
        self._keys.setdefault(normalised(text), key)


def normalised(text: str) -> str:
    """What equal texts have in common."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(plain)) or plain.strip()
