"""Fields of a row that hold content and are not read: counted, so that nobody misses them in silence.

conversation.py reads the fields of a row's shape and honours or refuses what it knows to change their meaning. Of the
rest, ids, scores and the like do not matter; what matters is a field that another shape would have read, and any text
or list of objects that looks like a part of the conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ultrafuser_mega.data.columns import renamed
from ultrafuser_mega.data.conversation import (
    MESSAGES,
    PAIRS,
    SYSTEM,
    TRAINED,
    answer_field,
    find_shape,
    message_keys,
    message_lists,
)

_SHORTEST_TEXT = 24  # characters; shorter ones are names, dates, sources
_ORIGIN = "provenance"  # says where a row comes from, as `ultrafuser synthesize` writes it
# These mean something however short they are.
_CONTENT = {
    *(name for ask, answers in PAIRS for name in (ask, *answers)),
    *(*MESSAGES, *SYSTEM, "input", "history", "context", "query", "name"),
    *("chosen", "rejected", "reasoning", "reasoning_content", "thinking"),
}


def unread_fields(row: dict[str, Any], columns: Mapping[str, str]) -> list[str]:
    """Names of the row's fields, and of its messages' as ``messages[].name``, that hold unread content.

    ``row`` is one that :func:`conversation.to_conversation` took, ``columns`` its file's names (columns.py).
    """
    value = renamed(row, columns)
    shape = find_shape(value)
    assert shape is not None
    lists = message_lists(value, shape)
    read = {*SYSTEM, _ORIGIN, *lists}
    of_messages: list[str] = []
    for field in lists:
        for message in value[field]:
            content = _content_of(message, {*message_keys(message), *TRAINED})
            of_messages += [f"{field}[].{name}" for name in content]
    if not lists:
        read |= {shape, "history", str(answer_field(value, shape))} | ({"input"} if shape == "instruction" else set())
    if columns:
        read = {_ORIGIN, *columns.values()}
    return list(dict.fromkeys([*_content_of(row, read), *of_messages]))


def _content_of(holder: Mapping[str, Any], read: Iterable[str]) -> list[str]:
    return [
        name
        for name, value in holder.items()
        if value and name not in read and (_looks_like_content(value) or (name in _CONTENT and _is_text(value)))
    ]


def _looks_like_content(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip()
        is_prose = not text.isascii() or any(character.isspace() for character in text)
        return len(text) >= _SHORTEST_TEXT and is_prose
    if isinstance(value, dict):
        return any(map(_looks_like_content, value.values()))
    if isinstance(value, list):
        return any(isinstance(item, dict) or _looks_like_content(item) for item in value)
    return False


def _is_text(value: Any) -> bool:
    return not isinstance(value, bool | int | float) and (not isinstance(value, str) or bool(value.strip()))
