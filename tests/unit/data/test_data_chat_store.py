"""Chat templates that show history otherwise, from a file to the store and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ultrafuser_mega.data.prepare import prepare_store
from ultrafuser_mega.data.report import PrepareReport
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError

SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q]{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }}: {% endif %}{{ m.content }}[/Q]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture
def report(bytelevel: Path, tmp_path: Path) -> PrepareReport:
    folder = tmp_path / "mistral"
    shutil.copytree(bytelevel, folder)
    (folder / "chat_template.jinja").write_text(SYSTEM_LAST)
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[1:]}, {"messages": MESSAGES[:3]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    specialists = {"chat": (folder, "hf"), "plain": (bytelevel, "ultralm")}
    return prepare_store(
        tmp_path / "store", {"all": [tmp_path / "rows.jsonl"]}, specialists, vocab_size=474, max_length=200
    )


def test_a_conversation_that_becomes_several_samples_is_one_row(report: PrepareReport, bytelevel: Path) -> None:
    counts = report.counts("all", "train")
    assert (counts["rows"], counts["kept"], counts["samples"], counts["turns"]) == (3, 3, 4, 5)
    samples = TokenStore.open(report.folder).split("all", "train")
    tokenizer = AutoTokenizer.from_pretrained(bytelevel, local_files_only=True)
    texts = [[tokenizer.decode(ids) for ids in sample.prompts_of("chat")] for sample in samples]
    assert texts == [
        ["[Q]Be brief.: one?[/Q]"],
        ["[Q]one?[/Q] yes<|endoftext|>[Q]Be brief.: two?[/Q]"],
        ["[Q]one?[/Q]", "[Q]two?[/Q]"],
        ["[Q]Be brief.: one?[/Q]"],
    ]
    answers = [[tokenizer.decode(ids) for ids in sample.responses] for sample in samples]
    assert answers == [
        [" yes<|endoftext|>"],
        [" no<|endoftext|>"],
        [" yes<|endoftext|>", " no<|endoftext|>"],
        answers[0],
    ]


def test_the_report_says_how_responses_end_and_whose_template_ends_turns_otherwise(report: PrepareReport) -> None:
    assert report.endings() == (
        "responses end with <|endoftext|>, as chat's template ends a turn; "
        "the templates of others end one otherwise: plain with <|im_end|>"
    )
    assert TokenStore.open(report.folder).eos_id == 0


def test_another_first_specialist_makes_another_store_since_its_ending_is_trained(
    report: PrepareReport, bytelevel: Path, tmp_path: Path
) -> None:
    specialists = {"plain": (bytelevel, "ultralm"), "chat": (tmp_path / "mistral", "hf")}
    arguments: dict[str, Any] = {"vocab_size": 474, "max_length": 200}
    sources = {"all": [tmp_path / "rows.jsonl"]}
    with pytest.raises(InputError, match=r"holds a store made from other inputs \(the specialists' order or endings"):
        prepare_store(report.folder, sources, specialists, **arguments)
    prepare_store(report.folder, sources, specialists, **arguments, overwrite=True)
    assert TokenStore.open(report.folder).eos_id == 2, "<|im_end|>"
