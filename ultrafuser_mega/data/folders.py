"""A folder that is written as a whole: under a hidden name beside its own, which it gets when it is complete.

Processes that would write the same one take turns, of other machines too where they share the file system.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ultrafuser_mega.files import NO_LOCKS


@contextmanager
def in_turn(out: Path) -> Iterator[None]:
    """One process at a time writes ``out``; another one says that it waits. Behind the wait there may be a folder."""
    lock = FileLock(out.parent / f".{out.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{out}: another process is writing it; waiting for that", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:  # where there are none, there are no turns
            raise
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else's
        lock.release()


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A new hidden folder beside ``out``, gone in the end; those that killed processes left are removed first.

    Its process holds a lock on it, which ends with the process, however that ends.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with suppress(OSError), _opened(left) as handle:  # another process is at it, or it is someone else's
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(left.iterdir()):  # an empty one may be about to be locked
                shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        with _opened(work) as handle:
            with suppress(OSError):  # network folders that lock no folders: nobody removes anything there
                fcntl.flock(handle, fcntl.LOCK_EX)
            work.chmod(0o755)  # mkdtemp is for private files; a store is for a team
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def move_into_place(work: Path, out: Path) -> None:
    """Rename the finished store; an older one steps aside first and is deleted last."""
    if not out.exists():
        work.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    try:
        out.rename(old / "store")
        work.rename(out)
    finally:
        shutil.rmtree(old)
