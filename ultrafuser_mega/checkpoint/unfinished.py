"""The hidden folder beside its target in which a checkpoint or a release is written: by one job, renamed in the end."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.files import NO_LOCKS, obstacle_to


def unfinished_of(out: Path) -> Path:
    """Where ``out`` is written before it gets its name."""
    return out.with_name(f".{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise InputError where there is something of this name."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; nothing is overwritten, choose another name or remove it")


def refuse_out(out: Path) -> None:
    """Raise InputError where ``out`` exists or could not be made: before the work that it is the result of."""
    refuse_existing(out)
    if obstacle := obstacle_to(out):
        raise InputError(f"--out {out}: {obstacle}; choose another folder")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``; a process that ends, however it does, lets go of it.

    Raises:
        InputError: another process is at it, or there is no such folder any more.
    """
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with writing(folder):
                is_there = os.path.samestat(os.fstat(handle), folder.stat())
        except BlockingIOError:
            is_there = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            is_there = True
        if not is_there:  # or another process has removed it and made it anew
            raise InputError(f"{folder}: another process writes to this name; wait, or choose another name")
        yield
    finally:
        os.close(handle)


def finish(folder: Path, out: Path) -> None:
    """Give ``folder`` the name ``out``; it and all in it survive a power cut."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    folder.rename(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
