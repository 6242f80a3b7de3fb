"""Texts as words: what copies are looked for in, whatever their case, punctuation and spacing."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    r"""The runs of ``\w`` of a text, in Unicode's compatible form (NFKC) and without case."""
    if text.isascii():
        return _WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
