"""Exceptions whose message is all that a person needs; every other one is a defect of the program.

Raise :class:`InputError` wherever a person can fix the cause: a configuration value, a file, a
checkpoint, a launch command; :class:`DivergedError` where training has left the numbers. Entry points print their
messages as a single line, without a traceback, and exit with code 2 for the first and 3 for the second.
"""

import errno

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3

# Full, read-only or forbidden places.
_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE, errno.EIO)
}
# Names that no file or folder can have where they point.
_OF_A_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}


class InputError(ValueError):
    """Bad input, described in one line: the field or file, the value found, and what would work."""


class DivergedError(ArithmeticError):
    """Training ruined the numbers: a loss, gradient or weight is not finite, or far worse than it was.

    Which one, where, and what to go on from, in one line.
    """


def system_refusal(error: OSError) -> tuple[str, int] | None:
    """What the system has against a place, in one line, and the exit code; None where it may be a defect."""
    if error.errno not in _OF_THE_MACHINE | _OF_A_NAME:
        return None
    place = error.filename or "what was to be written"
    return f"{place}: {error.strerror}", EXIT_BAD_INPUT if error.errno in _OF_A_NAME else 1
