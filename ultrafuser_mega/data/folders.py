"""A folder that is written as a whole: under a hidden name beside its own, which it gets when it is complete."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
