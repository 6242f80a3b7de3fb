"""Exceptions whose message is all that a person needs; every other one is a defect of the program.

Raise :class:`InputError` wherever a person can fix the cause: a configuration value, a file, a
checkpoint, a launch command; :class:`DivergedError` where training has left the numbers. Entry points print their
messages as a single line, without a traceback, and exit with code 2 for the first and 3 for the second. What the system
has against a place (a full disk, no permission, a name that no file can have) is told the same way, with code 2.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
#: A limit on what may be spent is reached: to start it again helps with a higher one only.
EXIT_LIMIT = 4
#: Ended behind a checkpoint because a signal asked for it: start it again. EX_TEMPFAIL of sysexits.h, which no error of
#: Python, a shell or a signal has: a scheduler can be told to requeue by it.
EXIT_GO_ON = 75

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE, errno.EIO}
# Names that no file or folder can have where they point.
_OF_A_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}


class InputError(ValueError):
    """Bad input, described in one line: the field or file, the value found, and what would work."""


class DivergedError(ArithmeticError):
    """Training ruined the numbers: a loss, gradient or weight is not finite, or far worse than it was.

    Which one, where, and what to go on from, in one line.
    """


def system_refusal(error: OSError) -> str | None:
    """What the system has against a place, in one line; None where it may be a defect."""
    if error.errno not in _FULL | _FORBIDDEN | _OF_A_NAME:
        return None
    return _refusal(error, error.filename or "what was to be written")


@contextmanager
def writing(path: Path, *, as_whole: bool = False) -> Iterator[None]:
    """What the system has against a place as an InputError that names it.

    Args:
        path: what is read or written; named where the system names nothing.
        as_whole: name it in any case: what is in it has a name for the moment only.
    """
    try:
        yield
    except OSError as error:
        raise InputError(_refusal(error, path if as_whole else error.filename or path)) from None


def _refusal(error: OSError, place: str | Path) -> str:
    reason = error.strerror or str(error)
    if error.errno is None or error.errno in _FULL:  # no number: a library's words for what it met
        there = next((folder for folder in Path(str(place)).absolute().parents if folder.exists()), Path("/"))
        reason += f"; {shutil.disk_usage(there).free / 1e9:.2g} GB are free there"
    if error.errno == errno.EROFS:
        reason += "; name a place that can be written, or mount this one so"
    return f"{place}: cannot be read or written ({reason})"
