"""Files of prompts: every shape that training data has, answers in order, nothing half-written under a final name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.release_prompts import STEPS
from transformers import PreTrainedTokenizerFast

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer, Limits
from ultrafuser_mega.inference.batch import PromptFile, answer_file, new_file
from ultrafuser_mega.inference.embedded import Serving
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.sampling import Sampling

ROWS = [
    {"instruction": "Which city is the largest?", "input": "Berlin, Rome", "id": 7},
    {"question": "Janet has 3 apples and buys 14 more.", "answer": "17"},
    {"prompt": "def add(a, b):"},
    {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which city?"}]},
    {
        "conversations": [
            {"from": "human", "value": "Which city?"},
            {"from": "gpt", "value": "London"},
            {"from": "human", "value": "Is it the largest?"},
            {"from": "gpt", "value": "an answer that is left out"},
        ]
    },
]


@pytest.fixture
def opened(model: Any, release: Any) -> OpenedModel:
    return OpenedModel(model, PreTrainedTokenizerFast.from_pretrained(release), frozenset({2}))


@pytest.fixture
def answerer(opened: OpenedModel) -> Answerer:
    return Answerer(opened, Serving(rows=2))


def write(path: Any, rows: Any) -> PromptFile:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptFile(path)


def run(answerer: Any, source: Any, out: Any, trace: Any = None, system: Any = None) -> list[dict[str, Any]]:
    prompts = source.encode(answerer, system)
    answer_file(answerer, source, prompts, out, trace, Limits(STEPS), Sampling())
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_keep_their_fields_and_order_and_get_the_answers_of_single_prompts(
    answerer: Any, model: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    answers = run(answerer, source, tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k not in ("generated", "finish_reason")} for row in answers] == ROWS
    tokenizer = answerer._opened.tokenizer
    for messages, row in zip(source.messages, answers, strict=True):
        assert row["generated"] == model.chat(messages, tokenizer=tokenizer, max_new_tokens=STEPS)
        assert row["finish_reason"] in ("eos", "length")


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_batch_size_changes_nothing(answerer: Any, opened: Any, tmp_path: Path, batch_size: int) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    reference = run(answerer, source, tmp_path / "a.jsonl")
    assert run(Answerer(opened, Serving(batch_size)), source, tmp_path / "b.jsonl") == reference


def test_the_trace_holds_every_token_with_the_weight_of_each_specialist(answerer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    answers = run(answerer, source, tmp_path / "out.jsonl", trace=tmp_path / "trace.jsonl")
    traces = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [trace["row"] for trace in traces] == list(range(len(ROWS)))
    for trace, row in zip(traces, answers, strict=True):
        assert trace["specialists"] == answerer.names
        if "\ufffd" not in row["generated"]:
            assert "".join(token["text"] for token in trace["tokens"]) == row["generated"]
        assert all(abs(sum(token["weights"]) - 1) < 1e-5 for token in trace["tokens"])


def test_a_system_text_opens_conversations_that_bring_none(answerer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    plain, opened = source.encode(answerer, None), source.encode(answerer, "Answer in German.")
    assert [a == b for a, b in zip(plain, opened, strict=True)] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": 3}', r'in.jsonl:2: "instruction" must be text, found a number'),
        ('{"text": "x"}', r"in.jsonl:2: unknown shape: expected messages"),
        ("{", r"in.jsonl:2: bad JSON at column 2"),
        ('{"messages": []}', r'in.jsonl:2: "messages" holds no assistant message'),
    ],
)
def test_a_row_that_is_no_prompt_is_named_by_its_line(tmp_path: Path, line: Any, message: Any) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        PromptFile(path)


def test_a_prompt_without_room_for_an_answer_is_named_before_anything_is_answered(
    answerer: Any, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", [ROWS[0], {"prompt": "word " * 300}])
    with pytest.raises(InputError, match=r"in\.jsonl:2: the prompt has \d+ tokens for text, which reads 256 at most"):
        source.encode(answerer, None)


def test_fields_that_answers_are_written_to_are_not_lost(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"in\.jsonl:1: has the field generated already; rename it"):
        write(tmp_path / "in.jsonl", [{"prompt": "x", "generated": "y"}])


def test_half_a_surrogate_pair_in_another_field_is_kept(answerer: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "x", "id": "\\ud800"}\n')
    (answer,) = run(answerer, PromptFile(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert answer["id"] == "\ud800"


def test_files_that_are_there_are_not_overwritten(answerer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(InputError, match=r"in\.jsonl: exists already"):
        run(answerer, source, tmp_path / "in.jsonl")


def test_an_interrupted_file_does_not_get_its_name(
    answerer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    stream = answerer.stream

    def interrupted(*arguments: Any, **options: Any) -> Any:
        answers = 0
        for event in stream(*arguments, **options):
            yield event
            answers += isinstance(event, tuple)
            if answers == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(answerer, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(answerer, source, tmp_path / "out.jsonl", trace=tmp_path / "trace.jsonl")
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "trace.jsonl").exists()
    assert len((tmp_path / ".out.jsonl.partial").read_text().splitlines()) <= 2


def test_a_file_that_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with new_file(path) as first:
        first.write("1\n")
        with pytest.raises(InputError, match=r"out\.jsonl: another process writes to this name"), new_file(path):
            pass
        first.write("2\n")
    assert path.read_text() == "1\n2\n"
    with pytest.raises(InputError, match=r"out\.jsonl: exists already"), new_file(path):
        pass


def test_what_a_killed_process_left_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.partial").write_text("half a li")
    with new_file(tmp_path / "out.jsonl") as file:
        file.write("1\n")
    assert (tmp_path / "out.jsonl").read_text() == "1\n"


def test_a_disk_that_is_full_in_the_end_is_one_line_and_no_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    words = r"out\.jsonl: cannot be written: No space left"
    with pytest.raises(InputError, match=words), new_file(tmp_path / "out.jsonl"):
        raise full
    assert not (tmp_path / "out.jsonl").exists()
