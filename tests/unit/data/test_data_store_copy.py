"""A copy of a token store on a node's own disk: whole or not there, compared with its checksums, made once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import ultrafuser

from ultrafuser_mega.data.store_copy import copy_store
from ultrafuser_mega.errors import InputError

# Is killed when it has copied the manifest, which says that the store is finished.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from ultrafuser_mega.data.store_copy import copy_store
def half(store, work, **options):
    shutil.copy(Path(store) / "manifest.json", work)
    os.kill(os.getpid(), signal.SIGKILL)
shutil.copytree = half
copy_store(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def store(prepare: Any) -> Path:
    return Path(prepare().folder)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "store"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(out: Path) -> list[str]:
    """What lies there but the copy and the lock that copiers take turns by."""
    return sorted({path.name for path in out.parent.iterdir()} - {out.name, f".{out.name}.lock"})


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def test_a_copy_holds_every_byte_and_is_used_again(store: Path, out: Path) -> None:
    assert copy_store(store, out)
    assert contents(out) == contents(store)
    made = {path: path.stat().st_ino for path in out.rglob("*")}
    assert not copy_store(store, out)
    assert {path: path.stat().st_ino for path in out.rglob("*")} == made
    assert beside(out) == []


def test_a_damaged_copy_and_one_of_an_older_store_make_room(store: Path, out: Path, prepare: Any) -> None:
    copy_store(store, out)
    flip(out / "text" / "train" / "responses.bin")
    assert copy_store(store, out) and contents(out) == contents(store)
    prepare(max_length=300, overwrite=True)
    assert copy_store(store, out) and contents(out) == contents(store)
    assert beside(out) == []


def test_a_damaged_store_gets_no_copy(store: Path, out: Path) -> None:
    flip(store / "math" / "train" / "responses.bin")
    with pytest.raises(InputError, match=r"math/train/responses.bin: damaged: its checksum does not match"):
        copy_store(store, out)
    assert not out.exists() and beside(out) == []


def test_a_copy_whose_process_is_killed_half_way_has_no_name_and_is_made_anew(store: Path, out: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(store), str(out)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    assert not out.exists() and len(beside(out)) == 1
    assert copy_store(store, out) and contents(out) == contents(store)
    assert beside(out) == []


def test_a_place_that_is_no_copys_is_left_alone(store: Path, out: Path) -> None:
    with pytest.raises(InputError, match="is the token store itself; name a folder on a disk of this machine"):
        copy_store(store, store)
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is no token store; it is left alone, choose another folder"):
        copy_store(store, out)
    assert contents(out) == {"thesis.txt": b"precious"}


def test_the_command_copies_what_has_been_made_without_a_look_at_the_data(
    store: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--copy-to", out, f"data.store={store}"]  # of the embedded run, whose data are not there
    assert [ultrafuser(monkeypatch, *arguments) for _ in range(2)] == [0, 0]
    assert capsys.readouterr().out == f"copied to {out}\nalready in {out}\n"
    assert contents(out) == contents(store)
