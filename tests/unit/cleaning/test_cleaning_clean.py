"""Cleaning as a whole, on drawn rows: nothing is lost, the order stays, a second time changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrafuser_mega.cleaning import Benchmarks, BenchmarkText, Rules, clean

pytest.importorskip("rensa")

# A question in many words, of which a few are drawn anew: copies of all kinds come often.
_ASKED = [
    "please",
    "explain",
    "to",
    "a",
    "child",
    "of",
    "seven",
    "how",
    "the",
    "tides",
    "follow",
    "the",
    "moon",
    "around",
    "our",
    "old",
    "blue",
    "planet",
]
_questions = st.lists(st.sampled_from(range(len(_ASKED))), max_size=3).map(
    lambda places: " ".join("ocean" if place in places else word for place, word in enumerate(_ASKED))
)
_replies = st.sampled_from(
    ["The moon pulls the water.", "I cannot help with that.", "?", "```python\ndef f(:\n```", "Waves. " * 40, ""]
)
_rows: st.SearchStrategy[list[Any]] = st.lists(
    st.one_of(
        st.fixed_dictionaries({"question": _questions, "answer": _replies}),
        st.fixed_dictionaries({"messages": st.just([])}),
        st.sampled_from([None, 7, {}, {"question": "What?", "answer": "That.", "class": "odd"}]),
    ),
    max_size=12,
)
_ITEM = BenchmarkText(
    "tides", "tides/1", " ".join([*_ASKED[:13], "ocean", "ocean", "ocean", "ocean", "ocean", "ocean"])
)


@settings(max_examples=60, deadline=None)
@given(_rows, st.sampled_from(["question", "conversation"]))
def test_all_rows_are_kept_or_removed_in_their_order_and_once_and_for_all(rows: list[Any], compared: Any) -> None:
    rules, benchmarks = Rules(compared=compared), Benchmarks([_ITEM])
    kept, removed, report = clean(rows, rules, benchmarks)
    left = [id(row) for row in kept], [id(item.row) for item in removed]
    for row in rows:  # each is the next one of either list
        next(places for places in left if places[:1] == [id(row)]).pop(0)
    assert left == ([], [])
    assert sum(report.read.values()) == len(rows)
    assert sum(report.kept.values()) == len(kept)
    assert sum(sum(counts.values()) for counts in report.removed.values()) == len(removed)
    again = clean(kept, rules, benchmarks)
    assert again.kept == kept and not again.removed


def test_of_copies_the_first_that_may_stay_is_kept() -> None:
    question = " ".join(_ASKED)
    rows = [
        {"question": question, "answer": "I cannot help with that."},
        {"question": question, "answer": "The moon pulls the water.", "class": "sea"},
        {"question": question.upper(), "answer": "The sun does, too.", "class": "sea"},
        {"question": f"{question}, please", "answer": "The moon does.", "class": "sky"},
    ]
    kept, removed, report = clean(rows, Rules())
    assert kept == rows[1:2]
    assert [item.finding.rule for item in removed] == ["refusal", "exact_duplicate", "near_duplicate"]
    assert removed[1].finding.why == "as row 2" and removed[2].finding.why == "0.94 as row 2"
    assert report.removed == {"refusal": {"all": 1}, "exact_duplicate": {"sea": 1}, "near_duplicate": {"sky": 1}}
    by_conversation = clean(rows[1:3], Rules(compared="conversation", near=1))
    assert by_conversation.kept == rows[1:3]  # other replies


def test_the_report_shows_examples_and_what_benchmarks_were_met() -> None:
    rows = [{"question": _ITEM.question, "answer": "?!"}, {"question": _ITEM.question, "answer": "They do."}]
    report = clean(rows, Rules(), Benchmarks([_ITEM])).report.as_json()
    assert report["removed"] == {"length": {"all": 1}, "contaminated": {"all": 1}}
    assert report["rows"] == {"all": {"read": 2, "kept": 0}}
    assert report["examples"]["length"][0] | {"why": ""} == {
        "class": "all", "place": "row 1", "why": "", "question": _ITEM.question, "reply": "?!"
    }  # fmt: skip
    assert report["benchmarks"]["tides"] == {"items": 1, "too_short": 0, "rows": {"all": {"copy": 2, "any": 2}}}
    assert [match["place"] for match in report["matches"]] == ["row 1", "row 2"]
