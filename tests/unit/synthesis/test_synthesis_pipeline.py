"""Whole runs: exact counts, nothing asked twice, files that the trainer reads, and a person in between."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.counting_endpoint import Body, CountingEndpoint, chat, said
from support.small_synthesis import config_text, small_config

from ultrafuser_mega.checkpoint.unfinished import alone
from ultrafuser_mega.data.conversation import to_conversation
from ultrafuser_mega.data.unread import unread_fields
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.synthesis import pipeline
from ultrafuser_mega.synthesis.duplicates import normalised
from ultrafuser_mega.synthesis.pipeline import Outcome


def synthesize(endpoint: CountingEndpoint, folder: Path, *, review: bool = False, **keys: Any) -> Outcome:
    return pipeline.synthesize(small_config(endpoint.url, **keys), folder, review=review, console=Console(quiet=True))


def rows(folder: Path, of: str = "text") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / f"{of}.jsonl").read_text().splitlines()]


def left_out(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the ledger's."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("ledger")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def test_a_run_makes_what_is_asked_for_and_a_second_one_asks_nothing(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    synthesize(endpoint, tmp_path)
    asked, before = len(endpoint.seen), digests(tmp_path)
    for of in ("text", "code"):
        made = rows(tmp_path, of)
        about = [row["provenance"] for row in made]
        assert len(made) == 12 == len({normalised(row["messages"][0]["content"]) for row in made})
        assert Counter(one["origin"] for one in about) == {
            "first": 4,
            "strongly related": 4,
            "weakly related": 4,
        }
        assert sum(one["complicated"] for one in about) == round(0.3 * 12)
        assert len({tuple(one["topic"]) for one in about}) == 4
        ids = {one["id"] for one in about}
        assert all(one["parent"] in ids for one in about if one["origin"] != "first")
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert statistics["classes"]["text"]["topics"] == [2, 4] and left_out(tmp_path) == []
    assert "| text | 12 | 2 / 4 |" in (tmp_path / "README.md").read_text()
    synthesize(endpoint, tmp_path)
    assert len(endpoint.seen) == asked and digests(tmp_path) == before


def test_the_keys_of_every_row_are_in_the_ledger_with_its_text(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    from ultrafuser_mega.synthesis.ledger import Ledger

    synthesize(endpoint, tmp_path)
    ledger = Ledger(tmp_path, read_only=True)
    for row in rows(tmp_path):
        keys = row["provenance"]["ledger"]
        replies = [ledger.find(key) for key in keys["responses"]]
        assert [reply.text for reply in replies if reply] == [row["messages"][1]["content"]]
        assert all(ledger.find(key) for key in keys["instruction"])
        assert row["provenance"]["served"] == "served-1 fp"
    ledger.close()


def test_the_trainer_reads_the_rows_as_they_are(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    synthesize(endpoint, tmp_path, classes__text__turns={"share": 0.5, "most": 2}, classes__text__system="Be kind.")
    made = rows(tmp_path)
    for row in made:
        conversation = to_conversation(row)
        assert conversation.system == "Be kind." and len(conversation.turns) in (1, 3)
        assert unread_fields(row, {}) == []
    assert Counter(len(row["messages"]) for row in made) == {3: 6, 7: 6}


def test_parquet_holds_the_same_rows(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    synthesize(endpoint, tmp_path)
    found = parquet.read_table(tmp_path / "parquet" / "text.parquet").to_pylist()
    assert found == rows(tmp_path)


def test_another_prompt_of_one_class_asks_that_class_alone(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    own = tmp_path / "prompts"
    own.mkdir()
    synthesize(endpoint, tmp_path / "run")
    asked, code = len(endpoint.seen), rows(tmp_path / "run", "code")
    (own / "responses.jinja").write_text("Answer in rhymes: {{ instruction }}\n")
    synthesize(endpoint, tmp_path / "run", classes__text__prompts=str(own))
    news = endpoint.seen[asked:]
    # what comes before the responses is asked anew too where text's prompts were other than the general ones
    assert news and not [body for body in news if "programming" in str(body)]
    assert rows(tmp_path / "run", "code") == code
    assert sum("Answer in rhymes: " in str(body) for body in news) == 12
    assert all("rhymes" not in str(row["messages"]) for row in rows(tmp_path / "run"))


def test_what_repeats_is_left_out_and_made_up_for(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    met: list[str] = []

    def repeating(body: Body) -> tuple[int, dict[str, str], str] | None:
        if "capable assistant" not in body["messages"][0]["content"] or "daily" in str(body):
            return None
        text = said(body)
        met.append(text)
        items = json.loads(text)["items"] if text.startswith("{") else []
        if items and len(met) % 2:  # every other list begins with what was said before, in other letters
            items[0] = (
                "WRITE, a letter to the Garden of stone!"
                if len(met) % 4 == 1
                else "write a letter to the garden of stone"
            )
        return 200, {}, json.dumps(chat(json.dumps({"items": items})))

    endpoint.misbehave = repeating
    synthesize(endpoint, tmp_path, classes__code__related={"strong": 0, "weak": 0}, endpoints__here__concurrency=1)
    made = rows(tmp_path, "code")
    assert len(made) == 12 == len({normalised(row["messages"][0]["content"]) for row in made})
    repeats = [line for line in left_out(tmp_path) if line["reason"].startswith("repeats: ")]
    assert repeats and all(normalised(line["text"]) == "write a letter to the garden of stone" for line in repeats)


def test_instructions_of_too_few_words_are_left_out_with_a_line_each(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    met = [0]

    def short(body: Body) -> tuple[int, dict[str, str], str] | None:
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties", {})
        if schema.get("items", {}).get("items", {}).get("type") != "string":
            return None
        met[0] += 1
        texts = [f"\u4ec0\u4e48\u662f\u6cb3\u6d41{met[0]}", f"Rivers {met[0]}"]  # five signs and a number; two words
        return 200, {}, json.dumps(chat(json.dumps({"items": texts})))

    endpoint.misbehave = short
    only = {"text": {"domain": "d", "topics": [1], "instructions": 3, "complicated": 0}}
    synthesize(endpoint, tmp_path, classes=only, near_duplicates=None)
    assert {row["messages"][0]["content"][:5] for row in rows(tmp_path)} == {"\u4ec0\u4e48\u662f\u6cb3\u6d41"}
    lines = [line for line in left_out(tmp_path) if line["reason"] == "fewer than 3 words"]
    assert {line["step"] for line in lines} == {"instructions", "related"} and len(lines) == met[0]
    assert all(line["text"].startswith("Rivers ") and line["key"] and line["topic"] for line in lines)
    assert (
        f"| text | related | fewer than 3 words | {sum(line['step'] == 'related' for line in lines)} |"
        in (tmp_path / "README.md").read_text()
    )
    asked = len(endpoint.seen)
    synthesize(endpoint, tmp_path, classes=only, near_duplicates=None, least_words=2)
    assert any(row["messages"][0]["content"].startswith("Rivers ") for row in rows(tmp_path))
    assert len(endpoint.seen) > asked


def test_what_was_made_more_complex_in_too_few_words_stays_as_it_was(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    def short(body: Body) -> tuple[int, dict[str, str], str] | None:
        return (200, {}, json.dumps(chat("Why?"))) if "more complex" in body["messages"][0]["content"] else None

    endpoint.misbehave = short
    only = {"text": {"domain": "d", "topics": [2], "instructions": 4, "complicated": 0.5}}
    synthesize(endpoint, tmp_path, classes=only)
    assert len(rows(tmp_path)) == 4 and not any(row["provenance"]["complicated"] for row in rows(tmp_path))
    lines = [line for line in left_out(tmp_path) if line["reason"] == "fewer than 3 words"]
    assert [(line["step"], line["text"]) for line in lines] == [("complicated", "Why?")] * 2


def test_a_model_that_knows_no_more_ends_with_fewer_and_says_so(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    def same(body: Body) -> tuple[int, dict[str, str], str] | None:
        asks = re.search(r"capable assistant|new instruction", body["messages"][0]["content"])
        return (200, {}, json.dumps(chat('{"items": ["Write a poem."]}'))) if asks else None

    endpoint.misbehave = same
    synthesize(endpoint, tmp_path, classes__code__complicated=0.0, classes__text__complicated=0.0)
    assert len(rows(tmp_path)) == 1
    reasons = [line["reason"] for line in left_out(tmp_path) if line["class"] == "text"]
    assert "11 of 12 instructions are missing: nothing new came" in reasons


def test_an_instruction_without_a_response_is_listed(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    plain = {"model": "m", "max_tokens": 64, "retries": 1}
    first: list[str] = []

    def cutting(body: Body) -> tuple[int, dict[str, str], str] | None:
        text = body["messages"][-1]["content"]
        if len(text.split()) > 20 or "words" in text:  # a prompt of ours
            return None
        first[:] = first or [text]
        return (200, {}, json.dumps(chat("half", 5, 64, "length"))) if text == first[0] else None

    endpoint.misbehave = cutting
    synthesize(endpoint, tmp_path, steps__responses=plain)
    assert len(rows(tmp_path)) + len(rows(tmp_path, "code")) == 23
    (line,) = [line for line in left_out(tmp_path) if line["step"] == "responses"]
    assert line["reason"] == "no reply could be used: cut, cut" and line["text"] == first[0] and line["key"]


def test_a_person_looks_through_every_list_and_the_run_goes_on_from_what_is_left(
    endpoint: CountingEndpoint, tmp_path: Path
) -> None:
    only = {"text": {"domain": "daily life", "topics": [2, 4], "instructions": 6}}
    first = synthesize(endpoint, tmp_path, review=True, classes=only)
    assert first.files == [] and [path.name for path in first.to_review] == ["text.meta_topics.yaml"]
    path = first.to_review[0]
    topics = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump([{**topics[0], "name": "By hand"}]))
    second = synthesize(endpoint, tmp_path, review=True, classes=only)
    assert [path.name for path in second.to_review] == ["text.sub_topics.yaml"]
    third = synthesize(endpoint, tmp_path, review=True, classes=only)
    (path,) = third.to_review
    lines = path.read_text().splitlines()
    assert path.name == "text.instructions.jsonl" and len(lines) == 6
    changed = {**json.loads(lines[0]), "text": "Changed by hand."}
    path.write_text("\n".join([json.dumps(changed), *lines[2:], '{"text": "Written by hand."}']))
    last = synthesize(endpoint, tmp_path, review=True, classes=only)
    assert len(last.files) == 1
    made = rows(tmp_path)
    assert [made[0]["messages"][0]["content"], made[-1]["messages"][0]["content"]] == [
        "Changed by hand.",
        "Written by hand.",
    ]
    assert {row["provenance"]["topic"][0] for row in made[:-1]} == {"By hand"} and len(made) == 6
    assert made[-1]["provenance"]["origin"] == "by hand"


def test_two_processes_on_one_run_are_refused(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(InputError, match="another process writes to this name"):
        synthesize(endpoint, tmp_path)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"classes__text__topics": [9, 4]}, "classes.text: topics: [9, 4] has fewer topics at a lower level"),
        ({"classes__text__topics": None}, "classes.text: give either topics, as in [21, 407], or topics_file"),
        ({"steps__responses": {"model": "n"}}, "steps.responses.model: there is no 'n'; use one of m"),
        ({"steps__answers": {"model": "m"}}, "steps: answers: there is no 'answers'; use one of meta_topics,"),
        ({"models__m__endpoint": "there"}, "models.m.endpoint: there is no 'there'; use one of here"),
        (
            {"models__m__price": None, "limit": {"money": 3}},
            "limit.money needs models.m.price; or limit tokens instead",
        ),
        ({"name": "text, code"}, "name: 'text, code' holds more than letters, digits, spaces, dots and dashes"),
        ({"endpoints__here__url": "host:1"}, "endpoints.here.url: String should match pattern"),
        ({"endpoints__here__keys": "K"}, "unknown key endpoints.here.keys; did you mean endpoints.here.key?"),
        ({"models__m__parameters": {"n": 2}}, "models.m.parameters: n is set by the steps or not supported"),
        ({"classes__text__steps": {"responses": {"heat": 1}}}, "classes.text.steps.responses: unknown key heat"),
    ],
)
def test_a_wrong_configuration_is_told_in_one_line(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        small_config("http://127.0.0.1:1/v1", **keys)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_is_none_is_told(endpoint: CountingEndpoint, tmp_path: Path) -> None:
    (tmp_path / "instructions.jinja").write_text("Write {{ numbre }} instructions")
    with pytest.raises(InputError, match=r"prompts .*: instructions.jinja: 'numbre' is undefined"):
        synthesize(endpoint, tmp_path / "run", classes__text__prompts=str(tmp_path))
    (tmp_path / "answer.jinja").write_text("x")
    with pytest.raises(InputError, match=r"answer.jinja: there is no such step; use meta_topics"):
        synthesize(endpoint, tmp_path / "run", classes__text__prompts=str(tmp_path))


def test_shipped_examples_are_valid_and_the_papers_counts_add_up() -> None:
    from ultrafuser_mega.config.load import read_config
    from ultrafuser_mega.synthesis.config import SynthesisConfig

    folder = Path(__file__).parents[3] / "examples" / "synthesis"
    paper = read_config(SynthesisConfig, folder / "paper.yaml")
    levels = [data.topics for data in paper.classes.values() if data.topics]
    assert [sum(level) for level in zip(*levels, strict=True)] == [72, 1587]
    assert sum(data.instructions for data in paper.classes.values()) == 310_000
    assert len(read_config(SynthesisConfig, folder / "demo.yaml").classes) == 3
    assert yaml.safe_load(config_text("http://x"))["classes"]
