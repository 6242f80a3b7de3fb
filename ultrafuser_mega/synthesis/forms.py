"""The forms of replies: a list of topics, a list of instructions, a text.

An endpoint that offers it is held to a JSON schema. Any other is asked for plain text, and whatever list can be
recognised in the reply is taken: JSON, fenced or not; parts between lines of dashes; numbered or bulleted items.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ultrafuser_mega.synthesis.requests import Form, UnreadableError, whole_characters

_FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_DASHES = re.compile(r"^\s*-{3,}\s*$", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:#{1,4}\s*)?(?:\d{1,3}[.):]|[-*•])\s+", re.MULTILINE)
_NAME = re.compile(r"^(.{2,80}?)(?::\s+|\s+[-\u2013\u2014]\s+)(.+)$", re.DOTALL)
_LEAD_IN = re.compile(r"^(?:sure|certainly|of course|here (?:is|are|'s))\b[^\n]{0,200}:\s*\n+", re.IGNORECASE)
_MARKS = '*_`"“” \t'
_LONGEST_NAME = 120  # characters


def topic_list(number: int) -> Form:
    """``number`` topics, as (name, about)."""
    topic = _object({"name": {"type": "string"}, "about": {"type": "string"}})
    return Form(
        read=_topics,
        schema=_list_of(topic, number),
        as_json='Answer in JSON: {"items": [{"name": "...", "about": "..."}, ...]}, with the explanation as "about".',
        as_text=f'Answer with {number} lines and nothing else, each in the form "name: explanation".',
    )


def instruction_list(number: int) -> Form:
    """``number`` instructions."""
    return Form(
        read=lambda text: _instructions(text, number),
        schema=_list_of({"type": "string"}, number),
        as_json='Answer in JSON: {"items": ["...", ...]}, with one whole instruction in each text.',
        as_text="Answer with the instructions alone, and put a line of three dashes (---) between two of them."
        if number > 1
        else "Answer with the instruction alone.",
    )


def one_text() -> Form:
    """A text that is used as it is, but for what models say around it."""
    return Form(read=_text)


def any_text() -> Form:
    """A text that stays in the ledger: True."""
    return Form(read=lambda text: True)


def _topics(text: str) -> list[tuple[str, str]]:
    found = _items_of_json(text)
    if found is None:
        lines = [line for line in text.splitlines() if line.strip()]
        items = [_ITEM.sub("", line) for line in lines if _ITEM.match(line)] or lines
        found = [_named(item) for item in items]
    topics = [_topic(item) for item in found]
    named = [(name, about) for name, about in topics if 1 < len(name) <= _LONGEST_NAME and not name.endswith(":")]
    if not named:
        raise UnreadableError("no list of topics")
    return named


def _topic(item: Any) -> tuple[str, str]:
    if isinstance(item, dict):
        return _plain(item.get("name")), _plain(item.get("about"))
    return (_plain(item[0]), _plain(item[1])) if isinstance(item, tuple) else (_plain(item), "")


def _named(line: str) -> tuple[str, str]:
    found = _NAME.match(line.replace("**", ""))
    return (found[1], found[2]) if found else (line, "")


def _instructions(text: str, number: int) -> list[str]:
    found = _items_of_json(text)
    if found is None:
        text = _LEAD_IN.sub("", text.strip())
        if _DASHES.search(text):
            found = _DASHES.split(text)
        elif len(_ITEM.findall(text)) > 1:
            found = _ITEM.split(text)
            found = found if _ITEM.match(text) else found[1:]
        elif number == 1:
            found = [text]
        else:
            raise UnreadableError("no list of instructions")
    texts = [whole_characters(_ITEM.sub("", item.strip(), count=1).strip()) for item in found if isinstance(item, str)]
    if not any(texts):
        raise UnreadableError("no instruction")
    return [item for item in texts if item]


def _text(text: str) -> str:
    text = _LEAD_IN.sub("", text.strip()).strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and not {'"', "“", "”"} & set(text[1:-1]):
        text = text[1:-1].strip()
    if not text:
        raise UnreadableError("nothing but what is said around it")
    return text


def _items_of_json(text: str) -> list[Any] | None:
    """The list in a reply that is JSON, or has it in a fence; None where there is none."""
    for candidate in (text, *_FENCED.findall(text)):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            found = next((value for value in found.values() if isinstance(value, list)), None)
        if isinstance(found, list) and found:
            return found
    if text.lstrip().startswith(("{", "[")):
        raise UnreadableError("JSON that is damaged or holds no list")
    return None


def _plain(value: Any) -> str:
    return whole_characters(" ".join(value.split()).strip(_MARKS)) if isinstance(value, str) else ""


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(item: dict[str, Any], number: int) -> dict[str, Any]:
    return _object({"items": {"type": "array", "items": item, "minItems": number, "maxItems": number}})
