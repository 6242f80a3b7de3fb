"""Preparing one store twice at the same time: it is made once, and nobody meets another's half."""

from __future__ import annotations

import errno
import fcntl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ultrafuser_mega.data import prepare as preparing
from ultrafuser_mega.data.folders import in_turn
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError

PATIENCE_S = 60.0


class Together:
    """A first one that writes when a second one, which began before there was a store, waits for it or writes as well.

    Attributes:
        written: stores that were begun.
        said: of the second: whether it found a store, or the refusal.
    """

    def __init__(self, prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prepare, self.write = prepare, preparing.write_splits
        self.written, self.said = 0, list[Any]()
        self.second: threading.Thread | None = None
        self.second_is_there, self.options = threading.Event(), dict[str, Any]()
        self.monkeypatch = monkeypatch

    def run(self, **of_second: Any) -> Any:
        """The first one's report."""
        self.options = of_second
        self.monkeypatch.setattr(preparing, "write_splits", self._write_splits)
        self.monkeypatch.setattr(sys, "stderr", _Heard(self.second_is_there))
        report = self.prepare()
        assert self.second is not None
        self.second.join(PATIENCE_S)
        return report

    def _write_splits(self, *arguments: Any) -> Any:
        self.written += 1
        if self.second is None:
            self.second = threading.Thread(target=self._prepare_again)
            self.second.start()
            assert self.second_is_there.wait(PATIENCE_S)
        else:
            self.second_is_there.set()
        return self.write(*arguments)

    def _prepare_again(self) -> None:
        try:
            self.said.append(self.prepare(**self.options).reused)
        except InputError as error:
            self.said.append(str(error))


class _Heard:
    """Standard error that looks for a line about waiting."""

    def __init__(self, heard: threading.Event) -> None:
        self.heard = heard

    def write(self, text: str) -> None:
        if "another process is writing it; waiting for that" in text:
            self.heard.set()

    def flush(self) -> None: ...


@pytest.fixture
def together(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> Together:
    return Together(prepare, monkeypatch)


def test_two_that_begin_together_make_one_store_and_both_have_it(together: Together, tmp_path: Path) -> None:
    assert not together.run().reused and together.said == [True]
    assert together.written == 1
    TokenStore.open(tmp_path / "store", verify=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_one_with_other_inputs_is_refused_and_leaves_the_first_ones(together: Together) -> None:
    first = together.run(max_length=300)
    assert len(together.said) == 1 and "made from other inputs (max_length)" in together.said[0]
    assert together.written == 1 and TokenStore.open(first.folder).fingerprint == first.manifest["fingerprint"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_folders_have_no_locks_there_are_no_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(handle: int, way: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    with in_turn(tmp_path / "store"):
        (tmp_path / "store").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
