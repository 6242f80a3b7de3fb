"""Which instruction is there already: in the same words, or in nearly the same."""

from __future__ import annotations

from typing import Protocol

from ultrafuser_mega.cleaning.duplicates import NearDuplicates
from ultrafuser_mega.cleaning.words import words


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


class NearlySameWords:
    """The same, and texts that are alike besides (:class:`cleaning.duplicates.NearDuplicates`).

    Args:
        threshold: the least similarity of texts that count as alike, of the sets of three successive words.

    Raises:
        InputError: rensa is not installed.
    """

    def __init__(self, threshold: float) -> None:
        self._same = SameWords()
        self._near = NearDuplicates(threshold)

    def match(self, text: str) -> str | None:
        if (same := self._same.match(text)) is not None:
            return same
        near = self._near.match(text)
        return None if near is None else near.key

    def add(self, key: str, text: str) -> None:
        self._same.add(key, text)
        self._near.add(key, text)


def normalised(text: str) -> str:
    """What equal texts have in common."""
    return " ".join(words(text)) or text.strip()
