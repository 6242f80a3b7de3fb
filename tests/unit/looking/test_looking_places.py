"""What a place holds, and what is counted and drawn of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.looking import look
from ultrafuser_mega.looking.gather import BINS, bin_of, drawn, gather
from ultrafuser_mega.looking.places import Seen, find, rows_of


def write_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def seen(number: int, topic: str = "seas", of: str = "text") -> Seen:
    return Seen(of, (topic,), Conversation(((f"Question {number}?", "Answer."),)))


def test_what_a_synthesis_left_is_read_with_its_provenance(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Sort."}, {"role": "assistant", "content": "sorted()"}]
    provenance = {"class": "code", "topic": ["Web", "Pages"], "model": "m"}
    write_lines(tmp_path / "data/code.jsonl", [{"messages": messages, "provenance": provenance}])
    write_lines(
        tmp_path / "left_out.jsonl",
        [
            {"class": "code", "step": "responses", "reason": f"no reply could be used: {why}"}
            for why in ("cut", "empty")
        ],
    )
    found = find(tmp_path)
    assert found.left_out == {("code", "responses", "no reply could be used"): 2} and found.report is None
    assert list(rows_of(found.files)) == [Seen("code", ("Web", "Pages"), Conversation((("Sort.", "sorted()"),)))]


def test_rows_without_class_and_topic_are_their_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "seas.jsonl", [{"question": "Deep?", "answer": "Yes."}, {"question": "Salt?"}])
    assert list(rows_of(find(tmp_path / "*.jsonl").files)) == [
        Seen("seas", ("seas",), Conversation((("Deep?", "Yes."),))),
        None,
    ]


def test_what_is_nothing_to_look_at_is_one_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", [{"question": "Salt?"}])
    with pytest.raises(InputError, match=r"bad\.jsonl: no conversation to look at"):
        look([tmp_path / "bad.jsonl"], tmp_path / "page.html")
    (tmp_path / "out/kept").mkdir(parents=True)
    nothing = '{"files": [], "rows": {}, "rules": null, "removed": {}, "examples": {}, "benchmarks": {}, "matches": []}'
    for text, said in (
        ("{", "is no JSON"),
        ("[]", "no JSON object"),
        ("{}", "no report of ultrafuser clean"),
        (nothing, "no report"),
    ):
        (tmp_path / "out/report.json").write_text(text)
        with pytest.raises(InputError, match=said):
            find(tmp_path / "out")
    assert not (tmp_path / "page.html").exists()


def test_samples_are_drawn_evenly_over_topics() -> None:
    rows = [seen(n, "seas") for n in range(300)] + [seen(n, "hills") for n in range(3)] + [None]
    gathered = gather(rows, samples=9)
    assert gathered.malformed == 1 and gathered.classes["text"].topics == {("seas",): 300, ("hills",): 3}
    assert [sample.topic for sample in gathered.samples] == [("seas",)] * 6 + [("hills",)] * 3
    assert gathered == gather(rows, samples=9)


def test_rows_are_drawn_class_by_class() -> None:
    rows = [seen(n) for n in range(1000)] + [seen(n, of="code") for n in range(3)] + [None]
    found = drawn(rows, 100)
    assert {name: len(some) for name, some in found.items()} == {"text": 100, "code": 3}
    numbers = [int(one.conversation.turns[0][0].split()[1][:-1]) for one in found["text"]]
    assert len(set(numbers)) == 100 and 400 < sum(numbers) / 100 < 600  # from all over the file


def test_lengths_are_counted_by_half_powers_of_two() -> None:
    assert [bin_of(words) for words in (0, 1, 2, 3, 4, 5, 6, 8, 1 << 20)] == [0, 0, 2, 3, 4, 4, 5, 6, BINS - 1]
