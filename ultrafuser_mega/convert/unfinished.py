"""The hidden folder beside its target in which a conversion is written: by one process, renamed when complete.

Nothing that is there is ever overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ultrafuser_mega.errors import InputError, writing


def unfinished_of(out: Path) -> Path:
    """Where ``out`` is written before it gets its name."""
    return out.with_name(f".{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise InputError where there is something of this name."""
    if out.exists():
        raise InputError(f"{out}: exists already; nothing is overwritten, choose another name or remove it")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``; a process that ends, however it does, lets go of it.

    Raises:
        InputError: another process is at it.
    """
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process writes to this name; wait, or choose another name") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):  # network folders that lock no folders
                raise
        yield
    finally:
        os.close(handle)


def finish(folder: Path, out: Path) -> None:
    """Give ``folder`` the name ``out``, so that it survives a power cut."""
    folder.rename(out)
    handle = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
