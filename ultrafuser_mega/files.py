"""Files that a reader finds whole, and what is in the way of one."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What locking fails with in network folders that have no locks.
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write instead of ``path``, whose name it gets behind the block; it is gone where that fails."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        handle = os.open(draft, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def drop_drafts(folder: Path) -> None:
    """Remove what processes that were killed left of :func:`whole`, at any depth of a folder that nobody writes to."""
    for draft in folder.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", draft.name):
            draft.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader finds the old file or the new one, never half of one."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def obstacle_to(path: Path) -> str:
    """Why ``path`` could not be made or written, in words; empty where it could. Nothing is made."""
    place = path.absolute()
    try:
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            return f"{place} is a file"
        return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written by this user"
    except OSError as error:
        return f"{path}: {error.strerror}"
