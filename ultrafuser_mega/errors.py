"""Exceptions whose message is all that a person needs; every other one is a defect of the program.

Raise :class:`InputError` wherever a person can fix the cause: a configuration value, a file, a
checkpoint, a launch command; :class:`DivergedError` where training has left the numbers. Entry points print their
messages as a single line, without a traceback, and exit with code 2 for the first and 3 for the second.
"""

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3


class InputError(ValueError):
    """Bad input, described in one line: the field or file, the value found, and what would work."""


class DivergedError(ArithmeticError):
    """Training ruined the numbers: a loss, gradient or weight is not finite, or far worse than it was.

    Which one, where, and what to go on from, in one line.
    """
