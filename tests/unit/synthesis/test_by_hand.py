"""Topics and lists that a person wrote or edited: what is understood, and what is told by its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.counting_endpoint import CountingEndpoint
from support.small_synthesis import small_config

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.markdown import as_text, markdown_table
from ultrafuser_mega.synthesis import pipeline
from ultrafuser_mega.synthesis.instructions import Instruction
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.review import Review
from ultrafuser_mega.synthesis.topics import read_topics


def synthesize(endpoint: CountingEndpoint, folder: Path, **keys: Any) -> None:
    pipeline.synthesize(small_config(endpoint.url, **keys), folder, review=False, console=Console(quiet=True))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / "text.jsonl").read_text().splitlines()]


def test_topics_come_from_a_file_with_as_many_levels_as_it_has(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(
        "- Law\n- name: Nature\n  topics:\n  - {name: Rivers, topics: [Floods, {name: Fish, about: Wet.}]}\n"
    )
    only = {"text": {"domain": "d", "topics_file": str(path), "instructions": 9}}
    synthesize(endpoint, tmp_path / "run", classes=only)
    topics = Counter(tuple(row["provenance"]["topic"]) for row in rows(tmp_path / "run"))
    assert topics == {("Law",): 3, ("Nature", "Rivers", "Floods"): 3, ("Nature", "Rivers", "Fish"): 3}


# Ten topics of ten topics of ten ..: a million, in seven lines.
ANCHORS = "- &a0 {name: x}\n" + "".join(
    f"- &a{n + 1} {{name: y{n}, topics: [{', '.join(f'{{name: {i}n, topics: [*a{n}]}}' for i in range(10))}]}}\n"
    for n in range(6)
)


def test_topics_that_are_anchored_stand_where_they_are_named(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(
        "- {name: Law, topics: &both [Past, {name: Today, about: Now.}]}\n"
        "- &art {name: Art, about: Made., topics: *both}\n"
        "- {<<: *art, name: Music}\n"
    )
    topics = read_topics(path)
    assert [[*topic.leaves()][1][0] for topic in topics] == [("Law", "Today"), ("Art", "Today"), ("Music", "Today")]
    assert topics[2].about == "Made." and topics[0].topics[1].about == "Now."


def test_markup_in_topics_is_shown_and_does_nothing(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    names = ["[a](javascript:b)", "<img src=x>", "x | y", "two\nlines", "# *c*", "`d`", "\\|"]
    path = tmp_path / "topics.yaml"
    path.write_text(yaml.safe_dump([{"name": "<b>", "topics": names[:3]}, *names[3:5]]))
    only = {"text": {"domain": "d", "topics_file": str(path), "instructions": 3, "complicated": 0}}
    synthesize(endpoint, tmp_path / "run", classes=only)
    (line,) = [line for line in (tmp_path / "run" / "README.md").read_text().splitlines() if "javascript" in line]
    cell = r"\<b\> {\[a\](javascript:b), \<img src=x\>, x \| y}, two lines, \# \*c\*"
    assert line == f"| text | 3 | 3 / 3 | {cell} |"
    assert markdown_table(["a"], [[as_text("\\|")]]).splitlines()[-1] == r"| \\\| |"  # a backslash, then a bar


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1", "topics.yaml: the whole is no list; write '- name: ...' for every topic"),
        ("- {name: A}\n- {nam: B}", "topics.yaml: topic 2 has no name"),
        ("- {name: A, topics: [{name: B, sub: 3}]}", "topics.yaml: topic 1: topic 1: unknown key sub; use name, about"),
        ("[", "topics.yaml: not valid YAML"),
        ("[]", "topics.yaml: holds no topic"),
        ("- - {name: A}", "topics.yaml: topic 1 is a list; write '- name: ...' and put what is below it in its topics"),
        ("- A\n- name: B\n  topics: [[C]]", "topics.yaml: topic 2: topic 1 is a list; write"),
        ("- 1984", "topics.yaml: topic 1 is called 1984, which YAML takes for no text; put the name in quotes"),
        ("- A\n- name: no", "topics.yaml: topic 2 is called False, which YAML takes for no text"),
        ("- C\n- C++\n- c.", "topics.yaml: topic 3 is topic 1 once more, 'c.'; remove one of them"),
        (ANCHORS, "more than 100,000 topics; do anchors (&) hold one another?"),
    ],
)
def test_a_wrong_file_of_topics_is_told_by_place(
    text: str, told: str, endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(told)):
        synthesize(
            endpoint, tmp_path / "run", classes={"t": {"domain": "d", "topics_file": str(path), "instructions": 9}}
        )


def _reviewed(folder: Path, content: bytes) -> Review:
    (folder / "review").mkdir()
    (folder / "review" / "text.instructions.jsonl").write_bytes(content)
    (folder / "review" / "text.meta_topics.yaml").write_bytes(content)
    return Review(folder, wanted=False)


def test_a_list_is_read_as_it_was_written_whatever_its_texts_hold(tmp_path: Path) -> None:
    made = [Instruction("1", "one\u2028two\x85three", ("a\u2028b",), "first", ("k",))]
    assert isinstance(Review(tmp_path, wanted=True).instructions("text", made, LeftOut()), Path)
    assert Review(tmp_path, wanted=False).instructions("text", made, LeftOut()) == made


def test_a_line_that_stands_twice_counts_once_and_a_copy_with_another_text_is_one_of_its_own(tmp_path: Path) -> None:
    made = [
        Instruction("1", "One is this.", ("a",), "first", ("k",)),
        Instruction("2", "Two.", ("a",), "first", ("l",)),
    ]
    texts = [("1", "One is this."), ("1", "One is this."), ("1", "One is that."), ("2", "One is this."), ("", "By me.")]
    lines = "".join(json.dumps({"id": id, "topic": ["a"], "text": text}) + "\n" for id, text in [*texts, texts[-1]])
    left = LeftOut()
    found = _reviewed(tmp_path, lines.encode()).instructions("text", made, left)
    assert isinstance(found, list) and len({one.id for one in found}) == 3
    assert [(one.text, one.origin) for one in found] == [
        ("One is this.", "first"),
        ("One is that.", "by hand"),
        ("By me.", "by hand"),
    ]
    assert left.counts() == {("text", "instructions", "repeats"): 3}


def test_an_editors_mark_and_a_topic_without_a_list_are_understood(tmp_path: Path) -> None:
    content = '\ufeff{"text": "One.", "topic": "Law", "id": ["x"]}\r\n{"text": "Half \\ud83d."}\r\n'.encode()
    found = _reviewed(tmp_path, content).instructions("text", [], LeftOut())
    assert isinstance(found, list)
    assert [(one.text, one.topic) for one in found] == [("One.", ("Law",)), ("Half \ufffd.", ())]


@pytest.mark.parametrize("content", [b'{"text": "One."}\n{"text": "caf\xe9"}\n', b"\n" + b"[" * 100_000])
def test_a_list_that_cannot_be_read_is_told_with_its_line(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text\.instructions\.jsonl:2: is no "):
        _reviewed(tmp_path, content).instructions("text", [], LeftOut())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- caf\xe9\n", r":1: is no UTF-8"),
        (b"- &a {name: Law, topics: [*a]}\n", "without end"),
        (b"- 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"- {name: a, topics: " + b"[" * 5000, "not valid YAML"),
    ],
)
def test_topics_that_cannot_be_read_are_told_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        _reviewed(tmp_path, content).topics("text", "meta_topics", [])
