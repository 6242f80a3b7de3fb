"""A training row as a conversation, whatever shape the row came in.

Here the five shapes in which people keep instruction data become one: optional system text and a list
of (user, assistant) turns. Reading files is readers.py's work; what a specialist sees of a
conversation is templates.py's.

The shape is found by its fields, looked for in this order (other fields are ignored):

    messages                      [{"role": system|user|assistant, "content": text}, ...]      OpenAI
    conversations                 [{"from": system|human|gpt, "value": text}, ...]             ShareGPT
    instruction (+ input)         output | response                                            Alpaca, GPTeacher
    question                      answer | response                                            GSM8K
    prompt                        completion | response                                        OctoPack

Every shape may carry the system text in a field ``system`` or ``system_prompt``. A non-empty ``input``
follows the instruction on a line of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PAIR_SHAPES = (
    ("instruction", ("output", "response")),
    ("question", ("answer", "response")),
    ("prompt", ("completion", "response")),
)
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

_NO_ANSWER = "-"  # stands where an answer is wanted


class MalformedRowError(ValueError):
    """A row that is no conversation; the message is the reason, without the place (the reader knows it)."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """``turns`` holds (user text, assistant text) in order, at least one; ``system`` may be None.

    ``untrained`` are the places in ``turns`` whose answer is read as context and not trained; never all of them.
    """

    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    untrained: frozenset[int] = frozenset()


def to_conversation(row: Any) -> Conversation:
    """The conversation that a decoded JSON value holds.

    Texts are kept as they stand, spaces included. Raises MalformedRowError with the reason: not an object,
    no known shape, a missing field, a wrong type, an empty text, an odd order of roles, a text that
    is not valid Unicode.
    """
    if not isinstance(row, dict):
        raise MalformedRowError(f"expected an object, found {_type_name(row)}")
    system = next((_text(row, key, may_be_empty=True) for key in ("system", "system_prompt") if row.get(key)), None)
    if "messages" in row:
        return _from_messages(row["messages"], "messages", "role", "content", system)
    if "conversations" in row:
        return _from_messages(row["conversations"], "conversations", "from", "value", system)
    for ask, answers in _PAIR_SHAPES:
        if ask in row:
            return _from_pair(row, ask, answers, system)
    found = ", ".join(sorted(map(str, row))[:6]) or "none"
    raise MalformedRowError(
        f"unknown shape: expected messages, conversations, instruction, question or prompt, found the fields {found}"
    )


def to_prompt(row: Any) -> list[dict[str, str]]:
    """The messages, the last one the user's, that a row asks to answer; an answer that stands there is left out.

    The same shapes as in :func:`to_conversation`, which see for the errors; the answer may be missing.
    """
    if isinstance(row, dict):
        row = dict(row)
        for field, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
            messages = row.get(field)
            if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
                if _ROLES.get(str(messages[-1].get(role_key))) == "user":
                    row[field] = [*messages, {role_key: "assistant", text_key: _NO_ANSWER}]
                break
        else:
            for ask, answers in _PAIR_SHAPES:
                if ask in row:
                    row[answers[0]] = _NO_ANSWER
                    break
    conversation = to_conversation(row)
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for user, assistant in conversation.turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages[:-1]


def _from_pair(row: dict, ask: str, answers: tuple[str, ...], system: str | None) -> Conversation:
    answer = next((key for key in answers if key in row), None)
    if answer is None:
        raise MalformedRowError(f'missing field "{answers[0]}" (or "{answers[1]}") beside "{ask}"')
    user = _text(row, ask)
    if ask == "instruction" and row.get("input") is not None:
        extra = _text(row, "input", may_be_empty=True)
        if extra.strip():
            user = f"{user}\n{extra}"
    return Conversation(((user, _text(row, answer)),), system)


def _from_messages(messages: Any, field: str, role_key: str, text_key: str, system: str | None) -> Conversation:
    if not isinstance(messages, list):
        raise MalformedRowError(f'"{field}" must be a list, found {_type_name(messages)}')
    turns: list[tuple[str, str]] = []
    user: str | None = None
    for place, message in enumerate(messages):
        at = f"{field}[{place}]"
        if not isinstance(message, dict):
            raise MalformedRowError(f"{at} must be an object, found {_type_name(message)}")
        given = _text(message, role_key, at=at)
        role = _ROLES.get(given)
        if role is None:
            raise MalformedRowError(f'{at}.{role_key} is "{given}", expected system, user or assistant')
        text = _text(message, text_key, at=at, may_be_empty=role == "system")
        if role == "system":
            if place != 0:
                raise MalformedRowError(f"odd role order: {at} is system, which may only come first")
            system = text or system
        elif role == "user":
            if user is not None:
                raise MalformedRowError(f"odd role order: {at} is a second user message in a row")
            user = text
        else:
            if user is None:
                raise MalformedRowError(f"odd role order: {at} is an assistant message that no user message precedes")
            turns.append((user, text))
            user = None
    if user is not None:
        raise MalformedRowError(f'odd role order: "{field}" ends with a user message that nobody answers')
    if not turns:
        raise MalformedRowError(f'"{field}" holds no assistant message')
    return Conversation(tuple(turns), system)


def _text(holder: dict, key: str, *, at: str = "", may_be_empty: bool = False) -> str:
    name = f"{at}.{key}" if at else f'"{key}"'
    if key not in holder:
        raise MalformedRowError(f"missing field {name}")
    text = holder[key]
    if not isinstance(text, str):
        raise MalformedRowError(f"{name} must be text, found {_type_name(text)}")
    if not may_be_empty and not text.strip():
        raise MalformedRowError(f"{name} is empty")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MalformedRowError(f"{name} holds half of a surrogate pair at character {error.start}") from None
    return text


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
