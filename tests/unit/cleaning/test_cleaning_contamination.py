"""Planted copies of benchmarks' items are found, however they are dressed; what everybody writes is not."""

from __future__ import annotations

import pytest

from ultrafuser_mega.cleaning.contamination import Benchmarks, BenchmarkText, Hit
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.errors import InputError

EGGS = (
    "Maria's hens lay 16 eggs per day. She eats three for breakfast every morning and bakes cakes for her friends "
    "with four. She sells the rest at the market for $2 each. How much does she make every day?"
)
SOLUTION = (
    "Maria has 16 - 3 - 4 = 9 eggs left to sell each day, and so she makes 9 * 2 = 18 dollars every day of the week."
)
COLOUR = "What is your favourite colour?"
ITEMS = (
    BenchmarkText("eggs", "eggs/1", EGGS, SOLUTION),
    BenchmarkText("short", "short/1", COLOUR),
    BenchmarkText("short", "short/2", "Why me?"),
    BenchmarkText("sums", "sums/1", "Compute the sum of 12 and 30 and 7"),
)


def search(*turns: tuple[str, str], rule: str = "share") -> list[Hit]:
    return Benchmarks(ITEMS, rule).search(Conversation(turns))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "turns",
    [
        ((EGGS, "18"),),
        ((EGGS.upper().replace(".", " -- ").replace("'", "\u2019"), "18"),),
        ((f"Read this with care. {EGGS} Think step by step, then say what you have found.", "18"),),
        (("Hello", "Hello!"), (EGGS, "18")),
        (("Give me an exercise.", EGGS),),
        ((EGGS[: len(EGGS) * 4 // 5], "?"),),
    ],
    ids=["verbatim", "case and punctuation", "in a longer text", "in a later turn", "in a reply", "four fifths of it"],
)
def test_a_copy_of_a_question_is_found(turns: tuple[tuple[str, str], ...]) -> None:
    hit = search(*turns)[0]
    assert (hit.benchmark, hit.id, hit.part, hit.how, hit.removes) == ("eggs", "eggs/1", "question", "copy", True)
    assert hit.share >= 0.5 and hit.text.startswith("maria s hens lay 16 eggs per day")


def test_a_copy_of_an_answer_is_found() -> None:
    hits = search(("How much is it?", f"Let us see. {SOLUTION}"))
    assert [(hit.part, hit.share, hit.removes) for hit in hits] == [("answer", 1.0, True)]


def test_a_copy_with_other_numbers_is_listed_as_near_and_removes_nothing() -> None:
    item = BenchmarkText(
        "sums", "sums/2", "At 3 Ann buys 4 pears, at 5 Ben buys 6 figs, at 7 Cleo buys 8 plums: how many in all?"
    )
    other = "At 1 Ann buys 2 pears, at 3 Ben buys 9 figs, at 5 Cleo buys 4 plums: how many in all?"
    hits = Benchmarks([item]).search(Conversation(((other, "15"),)))
    assert [(hit.how, hit.share, hit.removes) for hit in hits] == [("near", 1.0, False)]
    hits = search(("Compute the sum of 1 and 2 and 3", "6"))  # too short for 13-grams
    assert [(hit.id, hit.how, hit.removes) for hit in hits] == [("sums/1", "near", False)]
    hits = search((EGGS.replace("16", "25"), "?"))  # most of its 13-grams do not have the number
    assert [(hit.id, hit.how) for hit in hits] == [("eggs/1", "copy")]


def test_numbers_alone_are_near_to_nothing() -> None:
    rows = Benchmarks([BenchmarkText("rows", "rows/1", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15")])
    assert rows.search(Conversation((("21 22 23 24 25 26 27 28 29 30 31 32 33 34 35", "?"),))) == []


def test_short_questions_are_found_as_a_whole_in_what_users_say() -> None:
    hit = search((f"Tell me: {COLOUR.lower()}", "Blue."))[0]
    assert (hit.id, hit.how, hit.share) == ("short/1", "copy", 1.0)
    assert search(("Write a survey.", COLOUR)) == []
    assert search(("What is your favourite song?", "None.")) == []
    assert Benchmarks(ITEMS).too_short == {"short": 1}


def test_a_phrase_in_common_removes_by_the_papers_rule_alone() -> None:
    phrase = "He sells the rest, she sells the rest at the market for $2 each. How much does it take, in all?"
    (hit,) = search((phrase, "?"))
    assert hit.how == "shared" and not hit.removes and 0 < hit.share < 0.5
    (hit,) = search((phrase, "?"), rule="any")
    assert hit.how == "shared" and hit.removes


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="no item"):
        Benchmarks([])
    with pytest.raises(InputError, match="expected share or any"):
        Benchmarks(ITEMS, "some")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="share 0"):
        Benchmarks(ITEMS, share=0)
