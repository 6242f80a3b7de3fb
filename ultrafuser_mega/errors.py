"""The one exception that means "the input is wrong", as opposed to "the program is wrong".

Raise :class:`InputError` wherever a person can fix the cause: a configuration value, a file, a
checkpoint, a launch command. Entry points print its message as a single line, without a traceback,
and exit with code 2. Every other exception is a defect of the program and keeps its traceback.
"""

EXIT_BAD_INPUT = 2


class InputError(ValueError):
    """Bad input, described in one line: the field or file, the value found, and what would work."""
