"""A training row as a conversation, whatever shape the row came in.

Here the six shapes in which people keep instruction data become one: optional system text and a list
of (user, assistant) turns. Reading files is readers.py's work; what a specialist sees of a
conversation is templates.py's; which fields of a row were not read unread.py tells.

The shape is found by its fields, looked for in this order (null counts as absent):

    messages                      [{"role": system|user|assistant, "content": text}, ...]      OpenAI
    conversations                 [{"from": system|human|gpt, "value": text}, ...]             ShareGPT
    instruction (+ input)         output | response                                            Alpaca, GPTeacher
    question                      answer | response                                            GSM8K
    prompt                        completion | response                                        OctoPack
    prompt, a list of messages    completion | response, a list: these alone are trained      TRL

What else changes what a row means is honoured or refused:

    system, system_prompt         the system text, in every shape; refused beside another system text in the messages
    input                         follows the instruction on a line of its own, if it is not empty
    history                       [[instruction, response], ...]: earlier turns, which are trained as well
    weight: 0, train: false, loss: false, trainable: false
                                  in an assistant's message: it is read as context and not trained; in the row: refused
    content: [{type: text}, ...]  the texts one after the other; other parts are refused
    tools, tool_calls, images...  refused: no template here shows them
    label: false, kto_tag: false  or 0, refused: an answer that should not be learnt (label: beside prompt, as in TRL)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MESSAGES = ("messages", "conversations")
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # in a message of either list
PAIRS = (
    ("instruction", ("output", "response")),
    ("question", ("answer", "response")),
    ("prompt", ("completion", "response")),
)
SYSTEM = ("system", "system_prompt")
TRAINED = ("weight", "train", "loss", "trainable")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_NOT_SHOWN = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio")
_NOT_SHOWN_IN_A_MESSAGE = ("tool_calls", "function_call", "audio", "images")
_DISLIKED = ("label", "kto_tag")  # the first says so only beside a prompt and its completion

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
    is not valid Unicode, something that no template shows, nothing to train.
    """
    if not isinstance(row, dict):
        raise MalformedRowError(f"expected an object, found {_type_name(row)}")
    _refuse_not_shown(row, _NOT_SHOWN)
    system = _system(row)
    shape = find_shape(row)
    for name in _DISLIKED if shape == "prompt" else _DISLIKED[1:]:
        if row.get(name) in (False, "false", "False"):  # 0 is False
            raise MalformedRowError(f'"{name}" is false: an answer that should not be learnt')
    if switch := _switched_off(row):
        raise MalformedRowError(f'"{switch}" is {row[switch]!r}: a row that should not be learnt')
    if shape is None:
        found = ", ".join(sorted(map(str, row))[:6]) or "none"
        raise MalformedRowError(
            "unknown shape: expected messages, conversations, instruction, question or prompt, "
            f"found the fields {found} (data.classes.NAME.columns can say what a file calls them)"
        )
    if lists := message_lists(row, shape):
        return _from_messages(row, lists, system)
    return _from_pair(row, shape, system)


def to_prompt(row: Any) -> list[dict[str, str]]:
    """The messages, the last one the user's, that a row asks to answer; an answer that stands there is left out.

    The same shapes as in :func:`to_conversation`, which see for the errors; the answer may be missing.
    """
    if isinstance(row, dict):
        shape = find_shape(row)
        row = {name: value for name, value in row.items() if name not in (*_DISLIKED, *TRAINED)}
        if shape in MESSAGES:
            row[shape] = _with_stand_in(row[shape])
        elif shape is not None:
            stands_in = {"role": "assistant", "content": _NO_ANSWER}
            row[answers_of(shape)[0]] = [stands_in] if message_lists(row, shape) else _NO_ANSWER
    conversation = to_conversation(row)
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for user, assistant in conversation.turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages[:-1]


def _with_stand_in(messages: Any) -> Any:
    """The messages with a stand-in for the answer that is wanted."""
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return messages
    role_key, text_key = message_keys(messages[-1])
    role = _ROLES.get(str(messages[-1].get(role_key)))
    if role not in ("user", "assistant"):
        return messages
    return [*(messages if role == "user" else messages[:-1]), {role_key: "assistant", text_key: _NO_ANSWER}]


def find_shape(row: dict[str, Any]) -> str | None:
    """The field that names the row's shape: one of MESSAGES, or the asking field of one of PAIRS; None if none does."""
    names = (*MESSAGES, *(ask for ask, _ in PAIRS))
    return next((name for name in names if row.get(name) is not None), None)


def answers_of(ask: str) -> tuple[str, ...]:
    """The fields in which the answer to ``ask`` may stand, the first that is there counts."""
    return dict(PAIRS)[ask]


def answer_field(row: dict[str, Any], ask: str) -> str | None:
    """The field in which this row's answer to ``ask`` stands; a null is only taken if there is nothing else."""
    there = [name for name in answers_of(ask) if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def message_lists(row: dict[str, Any], shape: str) -> tuple[str, ...]:
    """The fields whose messages make up a row of this shape, one list behind the other; none where it holds texts.

    Of two the first is what the second, which alone is trained, answers.
    """
    if shape in MESSAGES:
        return (shape,)
    if shape == "prompt" and isinstance(row[shape], list):
        return (shape, answer_field(row, shape) or answers_of(shape)[0])
    return ()


def message_keys(message: dict[str, Any]) -> tuple[str, str]:
    """The fields of its role and its text, as the message itself has them; OpenAI's if it has neither."""
    return next((keys for keys in MESSAGE_KEYS if keys[0] in message), MESSAGE_KEYS[0])


def _refuse_not_shown(holder: dict[str, Any], names: tuple[str, ...], at: str = "") -> None:
    for name in names:
        if holder.get(name) and holder[name] not in ("[]", "{}", "null"):  # some keep lists as JSON texts
            where = f"{at}.{name}" if at else f'"{name}"'
            raise MalformedRowError(f"{where} holds what no template here shows; only text is trained")


def _system(row: dict[str, Any]) -> str | None:
    given = {name: _text(row, name, may_be_empty=True) for name in SYSTEM if row.get(name)}
    if len(set(given.values())) > 1:
        raise MalformedRowError(f"{' and '.join(given)} hold two system texts")
    return next(iter(given.values()), None)


def _from_pair(row: dict[str, Any], ask: str, system: str | None) -> Conversation:
    answer = answer_field(row, ask)
    if answer is None:
        first, second = answers_of(ask)
        raise MalformedRowError(f'missing field "{first}" (or "{second}") beside "{ask}"')
    user = _text(row, ask)
    if ask == "instruction" and row.get("input") is not None:
        extra = _text(row, "input", may_be_empty=True)
        if extra.strip():
            user = f"{user}\n{extra}"
    return Conversation((*_history(row), (user, _text(row, answer))), system)


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise MalformedRowError(f'"history" must be a list, found {_type_name(history)}')
    turns = []
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            found = f"{len(pair)} of them" if isinstance(pair, list) else _type_name(pair)
            raise MalformedRowError(f"history[{place}] must be a list of an instruction and a response, found {found}")
        turn = {"instruction": pair[0], "response": pair[1]}
        at = f"history[{place}]"
        turns.append((_text(turn, "instruction", at=at), _text(turn, "response", at=at)))
    return turns


def _from_messages(row: dict[str, Any], fields: tuple[str, ...], system: str | None) -> Conversation:
    """Of the messages in ``fields`` (see ``message_lists``)."""
    placed: list[tuple[str, int, Any]] = []
    for field in fields:
        if field not in row:
            raise MalformedRowError(f'missing field "{field}" beside "{fields[0]}", which is a list of messages')
        if not isinstance(row[field], list):
            raise MalformedRowError(f'"{field}" must be a list, found {_type_name(row[field])}')
        placed += [(field, place, message) for place, message in enumerate(row[field])]
    turns: list[tuple[str, str]] = []
    untrained: set[int] = set()
    user: str | None = None
    for number, (field, place, message) in enumerate(placed):
        at = f"{field}[{place}]"
        if not isinstance(message, dict):
            raise MalformedRowError(f"{at} must be an object, found {_type_name(message)}")
        role, text = _role_and_text(message, field, at)
        is_trained = _is_trained(message, at) and field == fields[-1]
        if role == "system":
            if number != 0:
                raise MalformedRowError(f"odd role order: {at} is system, which may only come first")
            if system and text and system != text:
                raise MalformedRowError(f"{at} is another system text than the row's own")
            system = text or system
        elif role == "user":
            if user is not None:
                raise MalformedRowError(f"odd role order: {at} is a second user message in a row")
            user = text
        else:
            if user is None:
                raise MalformedRowError(f"odd role order: {at} is an assistant message that no user message precedes")
            if not is_trained:
                untrained.add(len(turns))
            turns.append((user, text))
            user = None
    if not row[fields[-1]] or not (turns or user):
        raise MalformedRowError(f'"{fields[-1]}" holds no assistant message')
    if user is not None:
        raise MalformedRowError(f'odd role order: "{fields[-1]}" ends with a user message that nobody answers')
    if len(untrained) == len(turns):
        raise MalformedRowError(f'nothing to train: every assistant message of "{fields[-1]}" has weight 0')
    return Conversation(tuple(turns), system, frozenset(untrained))


def _role_and_text(message: dict[str, Any], field: str, at: str) -> tuple[str, str]:
    _refuse_not_shown(message, _NOT_SHOWN_IN_A_MESSAGE, at)
    role_key, text_key = MESSAGE_KEYS[MESSAGES.index(field)] if field in MESSAGES else message_keys(message)
    if role_key not in message:
        role_key, text_key = message_keys(message)
    given = _text(message, role_key, at=at)
    role = _ROLES.get(given)
    if role is None:
        raise MalformedRowError(f'{at}.{role_key} is "{given}", expected system, user or assistant')
    if isinstance(message.get(text_key), list):
        message = {text_key: _joined(message[text_key], f"{at}.{text_key}")}
    return role, _text(message, text_key, at=at, may_be_empty=role == "system")


def _joined(parts: list[Any], at: str) -> str:
    """The text of a content that comes in parts, as chat templates write it: one after the other."""
    for place, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = f'"{part.get("type")}"' if isinstance(part, dict) else _type_name(part)
            raise MalformedRowError(f"{at}[{place}] is {kind}, expected a part of type text; only text is trained")
    return "".join(_text(part, "text", at=f"{at}[{place}]", may_be_empty=True) for place, part in enumerate(parts))


def _is_trained(message: dict[str, Any], at: str) -> bool:
    for name in TRAINED:
        value = message.get(name)
        if value not in (None, 0, 1) and name != "loss":  # true and false are 1 and 0; a loss may be a measured one
            raise MalformedRowError(f"{at}.{name} is {value!r}, expected 0 or 1")
    return _switched_off(message) is None


def _switched_off(holder: dict[str, Any]) -> str | None:
    """The field that takes a message or a row out of training."""
    return next((name for name in TRAINED if _is_off(name, holder.get(name))), None)


def _is_off(name: str, value: Any) -> bool:
    return value is False or (name != "loss" and not isinstance(value, str) and value == 0)


def _text(holder: dict[str, Any], key: str, *, at: str = "", may_be_empty: bool = False) -> str:
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
            raise MalformedRowError(
                f"{name} is no Unicode text at character {error.start}: half of a surrogate pair, or no UTF-8"
            ) from None
    return text


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
