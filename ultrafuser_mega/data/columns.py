"""A file's own names for the fields of a row: ``columns: {instruction: query, response: answer}``.

Keys are the names that conversation.py knows, values are the file's. ``role``, ``content``, ``from`` and ``value``
name fields of each message, the others fields of the row. With a mapping only what it names is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultrafuser_mega.data.conversation import MESSAGE_KEYS, MESSAGES, PAIRS, MalformedRowError
from ultrafuser_mega.errors import InputError

_OPTIONAL = ("input", "history", "system", "system_prompt")
_OF_A_MESSAGE = tuple(key for keys in MESSAGE_KEYS for key in keys)
_OF_A_PAIR = (name for ask, answers in PAIRS for name in (ask, *answers))
NAMES = tuple(dict.fromkeys([*MESSAGES, *_OF_A_MESSAGE, *_OF_A_PAIR, *_OPTIONAL]))


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise InputError for a name that is not known, and for a mapping that names no conversation."""
    for name in columns:
        if name not in NAMES:
            raise InputError(f"{name} is no field that is read; columns maps from {', '.join(NAMES)}")
    pairs = [ask in columns and any(answer in columns for answer in answers) for ask, answers in PAIRS]
    if columns and not any(pairs) and not any(name in columns for name in MESSAGES):
        raise InputError(
            f"columns {dict(columns)} names no conversation; it needs messages, or a question and its answer "
            f"({', '.join(f'{ask} + {answers[0]}' for ask, answers in PAIRS)})"
        )


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row under the names that conversation.py knows; as it is where ``columns`` is empty.

    Raises MalformedRowError for a field that ``columns`` names and the row lacks (system, input and history may be
    missing).
    """
    if not columns or not isinstance(row, dict):
        return row
    result = {}
    for name, own in columns.items():
        if name in _OF_A_MESSAGE:
            continue
        if own in row:
            result[name] = row[own]
        elif name not in _OPTIONAL:
            raise MalformedRowError(f'missing field "{own}", which columns names for {name}')
    of_a_message = {own: name for name, own in columns.items() if name in _OF_A_MESSAGE}
    for name, value in result.items():
        if of_a_message and isinstance(value, list):  # of messages, whatever shape the row has
            result[name] = [
                {of_a_message.get(key, key): part for key, part in message.items()}
                if isinstance(message, dict)
                else message
                for message in value
            ]
    return result
