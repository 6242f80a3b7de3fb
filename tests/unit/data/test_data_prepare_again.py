"""Preparing where something is already: finished stores, damaged ones, other people's folders, what a kill left."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError


def test_a_finished_store_of_the_same_inputs_is_used_again_even_if_files_were_renamed(
    prepare: Any, sources: Any, tmp_path: Path
) -> None:
    prepare()
    written = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    moved = sources["code"][0].rename(tmp_path / "renamed.jsonl")
    before = TokenStore.open(tmp_path / "store").fingerprint
    report = prepare(sources={**sources, "code": [moved]})
    assert TokenStore.open(tmp_path / "store").fingerprint == before
    assert report.reused and report.counts("code", "train")["kept"] == 5
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["max_length", "content", "template", "holdout"])
def test_a_store_of_other_inputs_is_refused_unless_overwritten(
    prepare: Any, sources: Any, specialists: Any, tmp_path: Path, change: str
) -> None:
    prepare()
    changes: dict[str, Any] = {}
    if change == "max_length":
        changes["max_length"] = 300
    elif change == "holdout":
        changes["holdout_rows"] = {sources["text"][0]: 3}
    elif change == "template":
        changes["specialists"] = {**specialists, "math": (specialists["math"][0], "ultralm")}
    else:
        with sources["text"][0].open("a") as file:
            file.write("\n")
    name = sources["text"][0].name
    word = {"max_length": "max_length", "template": "specialists", "holdout": "sources"}.get(change)
    word = word or f"sources: {name} has changed"
    with pytest.raises(InputError, match=rf"holds a store made from other inputs \({word}\)"):
        prepare(**changes)
    before = TokenStore.open(tmp_path / "store").fingerprint
    assert not prepare(**changes, overwrite=True).reused
    assert TokenStore.open(tmp_path / "store").fingerprint != before
    assert prepare(**changes).reused
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("change", ["max_length", "shorter", "template", "order"])
def test_a_store_of_other_inputs_is_told_without_reading_the_data(
    prepare: Any, sources: Any, specialists: Any, change: str
) -> None:
    prepare()
    before = dict(specialists)
    every: dict[str, dict[str, Any]] = {
        "max_length": {"max_length": 300},
        "template": {"specialists": {**before, "math": (before["math"][0], "ultralm")}},
        "order": {"specialists": dict(reversed(before.items()))},
    }
    changes = every.get(change, {})
    assert prepare(compare_only=True).reused
    if change == "shorter":
        text = sources["text"][0].read_text()
        sources["text"][0].write_text(text[: text.rindex("\n", 0, -1) + 1])
    word = {"template": "specialists", "shorter": "sources: .* has changed", "order": "the specialists' order"}
    with pytest.raises(InputError, match=rf"made from other inputs \(.*{word.get(change, change)}"):
        prepare(compare_only=True, **changes)


def test_more_rows_to_hold_out_than_a_file_has_are_refused(prepare: Any, sources: Any) -> None:
    with pytest.raises(InputError, match=r"99999 first rows are to be held out, and it has \d+$"):
        prepare(holdout_rows={sources["text"][0]: 99999})


def test_source_files_that_came_and_went_are_named(prepare: Any, sources: Any, tmp_path: Path) -> None:
    prepare()
    other = Path(shutil.copy(sources["code"][0], tmp_path / "other.jsonl"))
    gone = sources["math"][0].rename(tmp_path / "moved.jsonl")
    with other.open("a") as file:
        file.write("\n")
    with pytest.raises(InputError, match=r"\(sources: other.jsonl is new, moved.jsonl is new, math.jsonl is gone\)"):
        prepare(sources={**sources, "math": [gone], "code": [*sources["code"], other]})


def test_a_damaged_store_is_rebuilt_only_when_it_may_be_overwritten(prepare: Any, tmp_path: Path) -> None:
    prepare()
    (tmp_path / "store" / "text" / "train" / "responses.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"responses.bin: damaged: 0 bytes.*--overwrite"):
        prepare()
    assert not prepare(overwrite=True).reused
    TokenStore.open(tmp_path / "store")


def test_a_folder_that_is_no_store_is_left_alone(prepare: Any, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is no token store; it is left alone"):
        prepare(overwrite=True)
    assert (tmp_path / "store" / "thesis.txt").read_text() == "precious"


def test_nothing_is_left_behind_when_preparing_fails_half_way(prepare: Any, sources: Any, tmp_path: Path) -> None:
    sources["math"][0].write_text('[{"question": "a", "answer": "b"}, {oops}]')
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"math.jsonl:1: row 2: bad JSON"):
        prepare()
    assert set(tmp_path.iterdir()) == before


def test_what_a_killed_preparation_left_is_removed_unless_its_process_lives(prepare: Any, tmp_path: Path) -> None:
    left, held, other = (tmp_path / name for name in (".store.partial-a", ".store.partial-b", ".store2.partial-c"))
    for folder in (left, held, other):
        folder.mkdir()
        (folder / "tokens").write_bytes(b"half")
    process = os.open(held, os.O_RDONLY)  # as it holds its own
    try:
        fcntl.flock(process, fcntl.LOCK_EX)
        prepare()
    finally:
        os.close(process)
    assert [folder.exists() for folder in (left, held, other)] == [False, True, True]
    assert [path.name for path in tmp_path.glob(".store.partial-*")] == [held.name]
