"""Which language a text is in, where that is beyond doubt (py3langid, after Lui and Baldwin 2012)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from ultrafuser_mega.errors import InputError

_NO_PROSE = re.compile(  # the last one begins where a word may: tried in the middle of long ones it would take for ever
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+|(?<![^\s`$])\S*[(){}\[\];=<>\\_]\S*", re.DOTALL
)
_LETTERS = re.compile(r"[^\W\d_]+")
_LOOKED_AT = 400  # characters of prose
_FEWEST = 40  # letters; half as many where a writing has a sign to a word
_NONE = ("la", "zxx")  # Latin is what it says of HTML and of "lorem ipsum"; the other means no language
_SURE = 0.95  # probability: of lines of code, which look like Latin or pidgin to it, it is never so sure


def check_languages(codes: Sequence[str]) -> None:
    """Raise InputError for a code that is not known, or where py3langid is not installed."""
    if codes and (unknown := sorted(set(codes) - set(identifier().labels))):
        raise InputError(f"language {unknown[0]!r}: expected ISO 639-1 codes, of {', '.join(identifier().labels)}")


def foreign(text: str, codes: Sequence[str]) -> str | None:
    """The language of a text that is surely in none of ``codes``, and how sure; None: it may be in one of them."""
    prose = _NO_PROSE.sub(" ", text)[:_LOOKED_AT]
    letters = sum(map(len, _LETTERS.findall(prose)))
    if letters < (_FEWEST if prose.isascii() else _FEWEST // 2):
        return None
    language, probability = identifier().classify(prose)
    if language in (*codes, *_NONE) or probability < _SURE:
        return None
    return f"{language} ({float(probability):.2f})"


@cache
def identifier() -> Any:
    """py3langid's, loaded once; raises InputError where it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError(
            "languages are told by py3langid, which is not installed; pip install 'ultrafuser_mega[synthesis]'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
