"""What counts as there already."""

from __future__ import annotations

import pytest

from ultrafuser_mega.synthesis.duplicates import NearlySameWords, SameWords

TEXT = "Write a letter to the owner of the garden and ask for ten of the old stones near the river bank."


def test_the_same_words_repeat_whatever_stands_between_them() -> None:
    known = SameWords()
    known.add("a", TEXT)
    assert known.match(TEXT.upper().replace(" ", " - ")) == "a"
    assert known.match(TEXT.replace("ten", "nine")) is None
    known.add("b", "∀ ∃")
    assert known.match("∀ ∃") == "b" and known.match("∃ ∀") is None


def test_alike_texts_repeat_too_where_that_is_wanted() -> None:
    pytest.importorskip("rensa")
    known = NearlySameWords(0.6)
    known.add("a", TEXT)
    assert known.match(TEXT.replace("bank", "shore")) == "a"
    assert known.match(TEXT.lower()) == "a"
    assert known.match("Compare two ways to mend a clock, and say which one is cheaper in the end.") is None
