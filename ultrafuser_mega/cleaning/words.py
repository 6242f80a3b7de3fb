"""Texts as words: what copies are looked for in, whatever their case, punctuation and spacing."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")
# Thai to Lao, Burmese, Khmer, Japanese, Chinese: scripts that put no space between words
_UNSPACED = re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff]")


def words(text: str) -> list[str]:
    r"""The runs of ``\w`` of a text, in Unicode's compatible form (NFKC) and without case."""
    if text.isascii():
        return _WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def count_words(text: str) -> int:
    """How many words a text has; in scripts without spaces every sign counts as one."""
    return len(_UNSPACED.findall(text)) + len(words(_UNSPACED.sub(" ", text)))
