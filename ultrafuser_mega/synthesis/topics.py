"""Topics: a tree of names, made by a model level by level, or by a person in a file.

    - name: Technology
      about: What machines do for people.
      topics:
        - {name: Quantum Computing, about: Computers of another kind.}

Asked for level by level: the first in one conversation that goes on until there are enough, each further one for every
topic of the level above. A name that is there already is not taken twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ultrafuser_mega.config.load import parse_yaml
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.synthesis.client import Asker
from ultrafuser_mega.synthesis.config import SUB_TOPICS, TOPICS
from ultrafuser_mega.synthesis.duplicates import normalised
from ultrafuser_mega.synthesis.forms import topic_list
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.requests import Call, whole_characters
from ultrafuser_mega.synthesis.templates import Templates

_MOST_TOPICS = 100_000  # of a file: anchors (&) that hold anchors make any number of a few lines
_SPARE_CALLS = 3  # beyond those that it takes if every name is new


@dataclass
class Topic:
    """One, with those below it."""

    name: str
    about: str = ""
    topics: list[Topic] = field(default_factory=list)

    def leaves(self, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Topic]]:
        """The lowest topics of it, with the names on the way."""
        path = (*above, self.name)
        if not self.topics:
            yield path, self
        for topic in self.topics:
            yield from topic.leaves(path)


def spread(number: int, over: int) -> list[int]:
    """``number`` in ``over`` parts as equal as they can be."""
    return [number // over + (place < number % over) for place in range(over)]


async def first_level(
    asker: Asker, of: str, domain: str, number: int, templates: Templates, left_out: LeftOut
) -> list[Topic]:
    """Topics of a domain, in one conversation."""
    asks = _Asking(asker, of, TOPICS, number, left_out)
    messages: list[dict[str, str]] = []
    while (wanted := asks.next_number()) is not None:
        have = [topic.name for topic in asks.found]
        prompt = templates.render(TOPICS, domain=domain, number=wanted, have=have)
        messages.append({"role": "user", "content": prompt})
        if not await asks.ask(tuple(messages), wanted, templates.version(TOPICS)):
            messages.pop()  # nothing was said to this that a conversation could go on from
            continue
        said = "\n".join(f"{topic.name}: {topic.about}" for topic in asks.newest)
        messages.append({"role": "assistant", "content": said or "I know no more."})
    return asks.found


async def next_level(
    asker: Asker, of: str, domain: str, tops: Sequence[Topic], number: int, templates: Templates, left_out: LeftOut
) -> None:
    """Put ``number`` topics in all below the lowest ones of ``tops``."""
    parents = [found for top in tops for found in top.leaves()]

    async def below(path: tuple[str, ...], parent: Topic, share: int) -> None:
        asks = _Asking(asker, of, SUB_TOPICS, share, left_out, path)
        while (wanted := asks.next_number()) is not None:
            have = [topic.name for topic in asks.found]
            prompt = templates.render(SUB_TOPICS, domain=domain, parent=parent, path=path, number=wanted, have=have)
            await asks.ask(({"role": "user", "content": prompt},), wanted, templates.version(SUB_TOPICS))
        parent.topics = asks.found

    shares = spread(number, len(parents))
    asked = [below(path, parent, share) for (path, parent), share in zip(parents, shares, strict=True)]
    for end in await asyncio.gather(*asked, return_exceptions=True):
        if isinstance(end, BaseException):
            raise asker.stop or end


class _Asking:
    """Calls for a number of topics, until they are there or nothing new comes."""

    def __init__(
        self, asker: Asker, of: str, step: str, number: int, left_out: LeftOut, path: tuple[str, ...] = ()
    ) -> None:
        self.found: list[Topic] = []
        self.newest: list[Topic] = []
        self._asker, self._of, self._step, self._number = asker, of, step, number
        self._left_out, self._path = left_out, path
        self._per_call = asker.config.step(of, step).per_call
        self._calls_left = -(-number // self._per_call) + _SPARE_CALLS
        self._names: set[str] = set()
        self._calls = 0

    def next_number(self) -> int | None:
        """How many to ask for; None where it is enough."""
        lacking = self._number - len(self.found)
        if lacking > 0 and self._calls_left == 0:
            reason = f"{lacking} of {self._number} topics are missing: nothing new came"
            self._left_out.add(self._of, self._step, reason, " > ".join(self._path))
        return min(lacking, self._per_call) if lacking > 0 and self._calls_left else None

    async def ask(self, messages: tuple[dict[str, str], ...], number: int, version: str) -> bool:
        """Whether an answer could be used."""
        call = Call(self._of, self._step, messages, topic_list(number), version, self._calls)
        (answer,) = await self._asker.ask_all([call])
        self._calls += 1
        self._calls_left -= 1
        self._left_out.faults(call, answer, self._path)
        self.newest = []
        for name, about in answer.value or []:
            if (key := _key(name)) and key not in self._names and len(self.found) < self._number:
                self._names.add(key)
                self.newest.append(Topic(name, about))
                self.found.append(self.newest[-1])
        return answer.value is not None


def read_topics(path: Path) -> list[Topic]:
    """The topics in a file.

    Raises:
        InputError: it is missing, no YAML, or not of the form.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file of topics")
    found = parse_yaml(str(path), text_by_hand(path))
    try:
        topics = _read(found, str(path), "", count())
    except RecursionError:
        raise InputError(f"{path}: topics within topics without end; an anchor (&) may not hold itself (*)") from None
    if not topics:
        raise InputError(f"{path}: holds no topic")
    return topics


def text_by_hand(path: Path) -> str:
    """What a person left in a file, without the mark that some editors put in front.

    Raises:
        InputError: it is no UTF-8.
    """
    with writing(path):
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: is no UTF-8; save the file in that encoding") from None


def _key(name: str) -> str:
    """What names that mean the same topic have in common; C, C++ and C# do not."""
    return normalised(name.replace("+", " plus ").replace("#", " sharp "))


def write_topics(topics: Sequence[Topic]) -> str:
    """Text that :func:`read_topics` reads."""
    return yaml.safe_dump([_plain(topic) for topic in topics], sort_keys=False, allow_unicode=True, width=110)


def _plain(topic: Topic) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": topic.name}
    plain |= {"about": topic.about} if topic.about else {}
    return plain | ({"topics": [_plain(below) for below in topic.topics]} if topic.topics else {})


def _read(found: Any, source: str, where: str, numbers: Iterator[int]) -> list[Topic]:
    if not isinstance(found, list):
        raise InputError(f"{source}: {where or 'the whole'} is no list; write '- name: ...' for every topic")
    topics: list[Topic] = []
    names: dict[str, int] = {}
    for number, item in enumerate(found, start=1):
        here = f"{where}topic {number}"
        if next(numbers) >= _MOST_TOPICS:
            raise InputError(f"{source}: {here}: more than {_MOST_TOPICS:,} topics; do anchors (&) hold one another?")
        if isinstance(item, list):
            raise InputError(f"{source}: {here} is a list; write '- name: ...' and put what is below it in its topics")
        item = item if isinstance(item, dict) else {"name": item}
        if item.get("name") is not None and not isinstance(item["name"], str):
            told = f"is called {item['name']!r}, which YAML takes for no text; put the name in quotes"
            raise InputError(f"{source}: {here} {told}")
        if not (item.get("name") or "").strip():
            raise InputError(f"{source}: {here} has no name; write '- name: ...'")
        unknown = set(item) - {"name", "about", "topics"}
        if unknown:
            raise InputError(f"{source}: {here}: unknown key {min(map(str, unknown))}; use name, about, topics")
        name = whole_characters(item["name"].strip())
        if (first := names.setdefault(_key(name), number)) != number:
            raise InputError(f"{source}: {here} is {where}topic {first} once more, {name!r}; remove one of them")
        below = _read(item["topics"], source, f"{here}: ", numbers) if item.get("topics") else []
        topics.append(Topic(name, whole_characters(str(item.get("about") or "")), below))
    return topics
