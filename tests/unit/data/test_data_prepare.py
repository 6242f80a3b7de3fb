"""Preparing a store: every row ends in a sample or in the report, and the store appears whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console
from support.rows import write_rows

from ultrafuser_mega.data import build
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError


def decode(store: TokenStore, folder: Path, ids: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer.decode(ids.tolist())


def test_samples_come_back_as_they_were_written_in_the_order_of_the_files(
    prepare: Any, first: Any, tmp_path: Path
) -> None:
    report = prepare()
    assert not report.reused
    store = TokenStore.open(tmp_path / "store")
    assert store.class_names == ("text", "code", "math") and store.specialists == ("text", "code", "math")
    text = store.split("text", "train")
    assert len(text) == 7 and len(store.split("text", "heldout")) == 0
    for index, sample in enumerate(text):
        assert decode(store, first, sample.prompts["text"][0]) == f"<s> User: Name city {index}.\nAssistant:"
        assert decode(store, first, sample.prompts["code"][0]) == f"<s> [INST] Name city {index}. [/INST]"
        assert decode(store, first, sample.responses[0]) == f"Paris {index}</s>"
    sample = store.split("math", "train")[-1]
    assert len(sample.responses) == len(sample.prompts["math"]) == 2
    assert decode(store, first, sample.responses[1]) == "12</s>"
    for name in store.specialists:
        whole = sum(map(len, sample.prompts[name])) + sum(map(len, sample.responses))
        assert sample.length(name) == whole
    assert sample.response_tokens == sum(map(len, sample.responses))


def test_counts_add_up_and_hold_every_reason(prepare: Any, sources: Any, tmp_path: Path) -> None:
    with sources["code"][0].open("a") as file:
        file.write('{"prompt": "no answer"}\nnot json\n{"prompt": "%s", "completion": "b"}\n' % ("long " * 400))
    report = prepare()
    counts = report.counts("code", "train")
    assert (counts["rows"], counts["kept"], counts["cut"]) == (8, 5, 0)
    assert counts["dropped"] == {"malformed": 2, "prompt too long": 1}
    code = TokenStore.open(tmp_path / "store").split("code", "train")
    assert counts["response_tokens"] == code.response_tokens(range(5)).sum()
    assert counts["prompt_tokens"]["math"] == sum(len(s.prompts["math"][0]) for s in code)

    dropped = [json.loads(line) for line in (tmp_path / "store" / "dropped.jsonl").read_text().splitlines()]
    file = str(sources["code"][0])
    assert [(entry["file"], entry["line"], entry["row"], entry["reason"]) for entry in dropped] == [
        (file, 6, 6, "malformed"),
        (file, 7, 7, "malformed"),
        (file, 8, 8, "prompt too long"),
    ]
    lines = report.problems()
    assert lines[0] == f'malformed: {file}:6 (row 6): missing field "completion" (or "response") beside "prompt"'
    assert lines[1] == f"malformed: {file}:7 (row 7): bad JSON at column 1: Expecting value"
    assert lines[2].startswith(f"prompt too long: {file}:8 (row 8): math:")
    assert lines[3] == f"all dropped rows: {tmp_path / 'store' / 'dropped.jsonl'}"
    assert report.table().row_count == 6


@pytest.mark.parametrize(
    ("row", "line", "reason"),
    [
        ('{"prompt": "a"}', 6, 'missing field "completion"'),
        ('{"prompt": "a", "completion": 3}', 6, '"completion" must be text, found a number'),
        ('{"prompt": "a", "completion": ""}', 6, '"completion" is empty'),
        ('\n{"prompt": ', 7, "bad JSON at column"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', 6, "odd role order"),
        ('{"words": 1}', 6, "unknown shape"),
    ],
)
def test_on_malformed_fail_makes_no_store_and_names_the_row_by_file_and_line(
    prepare: Any, sources: Any, tmp_path: Path, row: Any, line: Any, reason: Any
) -> None:
    with sources["code"][0].open("a") as file:
        file.write(row + "\n")
    with pytest.raises(InputError) as raised:
        prepare(on_malformed="fail")
    assert str(raised.value).startswith(f"{sources['code'][0]}:{line} (row 6): {reason}")
    assert not (tmp_path / "store").exists()


def test_malformed_rows_of_an_array_are_named_by_row_and_line(prepare: Any, sources: Any) -> None:
    write_rows(sources["text"][0], [{"instruction": "a", "output": "b"}, {"instruction": "a"}], as_array=True)
    report = prepare()
    assert report.problems()[0].startswith(f"malformed: {sources['text'][0]}:6 (row 2): missing field")


@pytest.mark.parametrize("name", ["[a]", "[/b]", "[bold]"])
def test_the_title_of_the_table_is_the_folder_whatever_its_name(prepare: Any, tmp_path: Path, name: str) -> None:
    """rich reads [a] as a style, and ends in an error where one is closed that was not opened."""
    report = replace(prepare(), folder=Path(name) / "] [" / "store")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.table())
    assert str(report.folder) in console.export_text()


def test_only_some_dropped_rows_are_shown_and_the_rest_counted(prepare: Any, sources: Any) -> None:
    with sources["code"][0].open("a") as file:
        file.write("{}\n" * 9)
    lines = prepare().problems()
    assert len(lines) == 3 + 2 and lines[3] == "malformed: 6 more in code train"


def test_the_first_rows_of_a_file_and_whole_files_can_be_held_out(prepare: Any, sources: Any, tmp_path: Path) -> None:
    extra = write_rows(tmp_path / "extra.jsonl", [{"question": "1+1?", "answer": "2"}])
    write_rows(sources["code"][0], [{"prompt": "bad"}] + [{"prompt": f"{i}", "completion": "x"} for i in range(4)])
    prepare(holdout_rows={sources["text"][0]: 3, str(sources["code"][0]): 2}, holdout_files={"math": [extra]})
    store = TokenStore.open(tmp_path / "store")
    sizes = {name: (len(store.split(name, "train")), len(store.split(name, "heldout"))) for name in store.class_names}
    assert sizes == {"text": (4, 3), "code": (3, 1), "math": (6, 1)}, "a dropped row counts among the first rows"


def test_batches_smaller_than_the_data_change_nothing(prepare: Any, tmp_path: Path) -> None:
    prepare()
    whole = TokenStore.open(tmp_path / "store").manifest
    with patch.object(build, "_BATCH_ROWS", 2):
        (tmp_path / "store").rename(tmp_path / "before")
        prepare()
    assert TokenStore.open(tmp_path / "store").manifest == whole


def test_the_malformed_rows_of_all_classes_are_told_at_once(prepare: Any, sources: Any, tmp_path: Path) -> None:
    code, math = sources["code"][0], sources["math"][0]
    heldout = write_rows(tmp_path / "heldout.jsonl", [{"prompt": "a"}])
    with code.open("a") as file:
        file.write("{}\nnot json\n" * 6)
    with math.open("a") as file:
        file.write("[]\n")
    with pytest.raises(InputError) as raised:
        prepare(on_malformed="fail", holdout_files={"text": [heldout]})
    told = str(raised.value).split("; ")
    assert [part.partition(" (row")[0] for part in told[:10]] == [f"{code}:{line}" for line in range(6, 16)]
    assert told[0].startswith(f"{code}:6 (row 6): unknown shape: ")
    assert told[10:] == [
        f"and 2 more in {code}",
        f"{math}:7 (row 7): expected an object, found a list",
        f'{heldout}:1 (row 1): missing field "completion" (or "response") beside "prompt"',
        "mend the 14 malformed row(s), or leave them out with data.on_malformed: skip",
    ]
    assert "\n" not in str(raised.value)


def test_behind_a_malformed_row_that_ends_the_work_nothing_is_tokenised(
    prepare: Any, sources: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources["text"][0].write_text("[{}]")
    monkeypatch.setattr(build, "_write_batch", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(InputError, match=r"text.json:1 \(row 1\): unknown shape"):
        prepare(on_malformed="fail")


@pytest.mark.parametrize("on_malformed", ["skip", "fail"])
def test_a_file_in_another_format_is_refused_as_such_whatever_becomes_of_malformed_rows(
    prepare: Any, sources: Any, on_malformed: str
) -> None:
    sources["code"][0].write_text("prompt,completion\nadd,3\n")
    with pytest.raises(InputError, match=r'class "code": .*code.jsonl: its lines are no JSON objects'):
        prepare(on_malformed=on_malformed)


def test_shards_are_read_in_the_order_of_their_names_through_a_glob_or_a_folder(
    prepare: Any, sources: Any, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in (2, 0, 1):
        lines = [json.dumps({"prompt": f"{number} {place}", "completion": "x"}) + "\n" for place in range(3)]
        (shards / f"part-{number}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    report = prepare(sources={**sources, "code": [shards / "*.gz"]}, holdout_rows={shards / "part-1.jsonl.gz": 2})
    assert [report.counts("code", split)["kept"] for split in ("train", "heldout")] == [7, 2]
    files = [source["file"] for source in report.manifest["inputs"]["sources"] if source["class"] == "code"]
    assert files == [f"part-{number}.jsonl.gz" for number in range(3)]
    assert prepare(sources={**sources, "code": [shards]}, holdout_rows={shards / "part-1.jsonl.gz": 2}).reused


def test_columns_are_a_part_of_what_a_store_was_made_from(prepare: Any, sources: Any, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"query": "a", "reply": "b", "completion": "c"}])
    files = {**sources, "code": [other]}
    prepare(sources=files, columns={other: {"prompt": "query", "completion": "reply"}})
    before = TokenStore.open(tmp_path / "store").fingerprint
    changed = {other: {"prompt": "query", "completion": "completion"}}
    with pytest.raises(InputError, match=r"made from other inputs \(sources\)"):
        prepare(sources=files, columns=changed)
    assert not prepare(sources=files, columns=changed, overwrite=True).reused
    assert TokenStore.open(tmp_path / "store").fingerprint != before


def test_what_nobody_may_have_meant_is_said_repeated_rows_leaked_held_out_rows_and_unread_content(
    prepare: Any, sources: Any, tmp_path: Path
) -> None:
    row = {"prompt": "add 2", "completion": "return 2"}  # stands in the file already
    with sources["code"][0].open("a") as file:
        file.write(json.dumps(row | {"context": "in C"}) + "\n" + json.dumps(row | {"id": 5}) + "\n")
    heldout = write_rows(tmp_path / "heldout.jsonl", [row, {"instruction": "add 9", "output": "return 9"}])
    first_of_text = json.loads(sources["text"][0].read_text())[0]
    with sources["math"][0].open("a") as file:
        file.write(json.dumps(first_of_text) + "\n")
    report = prepare(holdout_files={"code": [heldout]})
    code, math = sources["code"][0], sources["math"][0]
    expected = [
        "code: field context is not read, it holds content in 1 row(s)",
        f"code: 2 of 7 training rows repeat an earlier one, as {code}:6 (row 6), {code}:7 (row 7)",
        f"code: 1 of 2 held-out rows are also trained on, as {heldout}:1 (row 1)",
        f"math: 1 of 7 training rows repeat an earlier one, as {math}:7 (row 7)",
    ]
    assert report.notices() == expected
    assert prepare(holdout_files={"code": [heldout]}).notices() == expected, "a store that is used again says the same"


def test_only_the_trained_turns_of_a_row_are_responses(prepare: Any, sources: Any, first: Any, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    write_rows(sources["math"][0], [{"messages": messages}])
    prepare()
    store = TokenStore.open(tmp_path / "store")
    (sample,) = store.split("math", "train")
    assert [decode(store, first, ids) for ids in sample.responses] == ["good</s>"]
    (prompt,) = sample.prompts["text"]
    assert "bad</s>" in decode(store, first, prompt) and decode(store, first, prompt).endswith("c\nAssistant:")


def test_an_empty_class_is_refused_with_the_reason(prepare: Any, sources: Any, tmp_path: Path) -> None:
    write_rows(sources["code"][0], [{"prompt": "a"}])
    with pytest.raises(InputError, match='class "code" is left without train rows: 1 read, dropped: 1 malformed'):
        prepare()
    write_rows(sources["code"][0], [])
    with pytest.raises(InputError, match='class "code" is left without train rows: 0 read, dropped: none'):
        prepare()
    write_rows(sources["code"][0], [{"prompt": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match='class "code" is left without heldout rows: 1 read'):
        prepare(holdout_rows={sources["code"][0]: 1})


def test_files_that_are_missing_or_listed_twice_are_named(prepare: Any, sources: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match='class "code" has no training files; expected at least one'):
        prepare(sources={**sources, "code": []})
    with pytest.raises(InputError, match=r'class "code": .*nowhere.json: no such file'):
        prepare(sources={**sources, "code": [tmp_path / "nowhere.json"]})
    with pytest.raises(InputError, match=r'class "math": .*text.json is listed twice'):
        prepare(sources={**sources, "math": sources["text"]})
    with pytest.raises(InputError, match=r'class "math": .*math.jsonl is listed twice'):
        prepare(holdout_files={"math": sources["math"]})
    with pytest.raises(
        InputError, match=r"holdout_rows: .*other.json \(first 3 rows\) is not one of the training files"
    ):
        prepare(holdout_rows={tmp_path / "other.json": 3})
    with pytest.raises(InputError, match=r"holdout_rows: .*text.json: -1; expected how many"):
        prepare(holdout_rows={sources["text"][0]: -1})
    with pytest.raises(InputError, match='held-out class "law" has no training files; classes are text, code, math'):
        prepare(holdout_files={"law": sources["text"]})


def test_bad_names_and_choices_are_refused(prepare: Any, sources: Any, specialists: Any) -> None:
    with pytest.raises(InputError, match='class "a/b": names serve as file names'):
        prepare(sources={"a/b": sources["text"]})
    with pytest.raises(InputError, match="no class was given"):
        prepare(sources={})
    with pytest.raises(InputError, match="no specialist was given"):
        prepare(specialists={})
    with pytest.raises(InputError, match='on_malformed is "ignore"; expected "skip" or "fail"'):
        prepare(on_malformed="ignore")
    with pytest.raises(InputError, match='template "alpaca" is not known'):
        prepare(specialists={"text": (specialists["text"][0], "alpaca")})


def test_a_progress_bar_goes_to_stderr_only_when_asked_for(
    prepare: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare()
    assert capfd.readouterr() == ("", "")
    prepare(progress=True, max_length=300, overwrite=True)
    captured = capfd.readouterr()
    assert captured.out == "" and "tokenising" in captured.err
