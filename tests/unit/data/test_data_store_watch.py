"""A store that changes while it is read: what is read stays the same, or the file is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.store_watch import StoreWatch
from ultrafuser_mega.errors import InputError


@pytest.fixture
def file(prepare: Any, tmp_path: Path) -> Path:
    """The responses of a class of a store."""
    prepare()
    return tmp_path / "store" / "text" / "train" / "responses.bin"


def spoilt(file: Path) -> bytes:
    data = file.read_bytes()
    return bytes([data[0] ^ 1]) + data[1:]


def read(store: TokenStore) -> list[list[int]]:
    return [response.tolist() for sample in store.split("text", "train") for response in sample.responses]


@pytest.mark.parametrize("how", ["removed", "replaced", "the whole store"])
def test_what_is_removed_or_replaced_goes_on_being_read_as_it_was_and_is_told_once(
    file: Path, tmp_path: Path, how: str
) -> None:
    wanted = read(TokenStore.open(tmp_path / "store"))
    store = TokenStore.open(tmp_path / "store")
    watch = StoreWatch(store)
    assert watch.look() is None
    if how == "replaced":
        (tmp_path / "new").write_bytes(spoilt(file))
        (tmp_path / "new").replace(file)
    elif how == "removed":
        file.unlink()
    else:
        shutil.rmtree(tmp_path / "store")
    said = watch.look()
    assert said is not None and ": removed or replaced; training goes on with what it was" in said
    assert how == "the whole store" or said.startswith(str(file))
    assert watch.look() is None
    assert read(store) == wanted


@pytest.mark.parametrize("how", ["overwritten", "cut"])
def test_what_is_written_into_a_file_is_an_error_that_names_it(file: Path, tmp_path: Path, how: str) -> None:
    watch = StoreWatch(TokenStore.open(tmp_path / "store"))
    with file.open("r+b") as opened:
        opened.write(spoilt(file)) if how == "overwritten" else opened.truncate(4)
    os.utime(file)
    with pytest.raises(InputError, match=r"responses.bin: damaged: .*; it changed while training read it"):
        watch.look()


def test_a_file_that_was_only_touched_is_as_good_as_before(file: Path, tmp_path: Path) -> None:
    watch = StoreWatch(TokenStore.open(tmp_path / "store"))
    os.utime(file, (0, 0))
    assert watch.look() is None
