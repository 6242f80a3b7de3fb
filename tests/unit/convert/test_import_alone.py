"""One name, one import: nothing that is there is overwritten, and two imports never write into each other."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.families import write_family

from ultrafuser_mega.convert.export import export
from ultrafuser_mega.convert.importer import ImportPlan, import_specialists, plan_folders
from ultrafuser_mega.errors import InputError


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ImportPlan:
    return plan_folders({"a": write_family(tmp_path_factory.mktemp("source") / "source", "llama")}, None)


def outcome(plan: ImportPlan, out: Path) -> str:
    """What an import is refused with; empty where it is not."""
    try:
        import_specialists(plan, out)
    except InputError as error:
        return str(error)
    return ""


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_of_two_imports_at_once_one_is_refused_and_the_other_is_whole(plan: ImportPlan, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        refused = sorted(pool.map(lambda _: outcome(plan, tmp_path / "checkpoint"), range(2)))
    assert refused[0] == ""
    held, done = f"{tmp_path}/.checkpoint.partial: another process writes", f"{tmp_path}/checkpoint: exists already"
    assert refused[1].startswith((held, done))
    assert names_in(tmp_path) == {"checkpoint"}
    export(tmp_path / "checkpoint", tmp_path / "out")  # which compares what both compute
    before = (tmp_path / "checkpoint" / "progress.json").stat()
    assert outcome(plan, tmp_path / "checkpoint").startswith(f"{tmp_path / 'checkpoint'}: exists already; ")
    assert (tmp_path / "checkpoint" / "progress.json").stat() == before


def test_an_import_and_an_export_to_the_same_name_keep_out_of_each_others_way(plan: ImportPlan, tmp_path: Path) -> None:
    unfinished = tmp_path / ".out.partial"
    unfinished.mkdir()
    other = os.open(unfinished, os.O_RDONLY)  # as an export holds it
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert outcome(plan, tmp_path / "out").startswith(f"{unfinished}: another process writes to this name; ")
    finally:
        os.close(other)
    (unfinished / "export.json").write_text("{}")
    assert outcome(plan, tmp_path / "out") == f"{unfinished}: left by an interrupted import or export; remove it"
    assert names_in(unfinished) == {"export.json"}


def test_a_place_that_cannot_be_written_is_one_line(plan: ImportPlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert outcome(plan, tmp_path / "file" / "out").endswith(
        "file/.out.partial: cannot be read or written (Not a directory)"
    )
