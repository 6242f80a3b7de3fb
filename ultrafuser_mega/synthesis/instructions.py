"""Instructions: asked for by sub-topic, related ones from each, a share of them made more complex.

A class goes round after round. A round asks, for every sub-topic that lacks some, so many calls at once, then for
instructions related to each new one; what repeats an earlier one is left out, as are instructions of too few words
(small models make a topic's name of a question); the next round makes up for both. Replies are looked at in the order
of their calls once all of a round are there, so the outcome does not depend on which came first. A sub-topic that
yields nothing new twice in a row hands on what it lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ultrafuser_mega.cleaning.words import count_words
from ultrafuser_mega.synthesis.client import Asker
from ultrafuser_mega.synthesis.config import COMPLICATED, INSTRUCTIONS, RELATED
from ultrafuser_mega.synthesis.duplicates import Duplicates
from ultrafuser_mega.synthesis.forms import instruction_list, one_text
from ultrafuser_mega.synthesis.left_out import LeftOut
from ultrafuser_mega.synthesis.requests import Answer, Call
from ultrafuser_mega.synthesis.templates import Templates
from ultrafuser_mega.synthesis.topics import Topic, spread

_SHOWN = 8  # instructions of the sub-topic that a call is told to keep away from
_SHOWN_CHARACTERS = 200
_DRY_AFTER = 2  # rounds without anything new

FIRST, STRONG, WEAK = "first", "strongly related", "weakly related"


@dataclass(frozen=True)
class Instruction:
    """One that was accepted.

    Attributes:
        id: of the text that it began as, within its class.
        text: as it is asked.
        topic: names from the top.
        origin: FIRST, STRONG or WEAK.
        keys: of the replies that it comes from.
        parent: id of the one that it is related to.
        simpler: its text before it was made more complex.
    """

    id: str
    text: str
    topic: tuple[str, ...]
    origin: str
    keys: tuple[str, ...]
    parent: str | None = None
    simpler: str | None = None


class Gathering:
    """The instructions of one class.

    Args:
        asker, templates, left_out, duplicates: to work with.
        of: the class.
        topics: its topics.
    """

    def __init__(
        self,
        asker: Asker,
        of: str,
        topics: Sequence[Topic],
        templates: Templates,
        duplicates: Duplicates,
        left_out: LeftOut,
    ) -> None:
        self._asker, self._of, self._templates = asker, of, templates
        self._duplicates, self._left_out = duplicates, left_out
        self._data = asker.config.classes[of]
        self._leaves = [found for topic in topics for found in topic.leaves()]
        self._accepted: list[list[Instruction]] = [[] for _ in self._leaves]
        self._wanted = spread(self._data.instructions, len(self._leaves))
        self._calls = [0] * len(self._leaves)
        self._dry = [0] * len(self._leaves)

    async def all(self) -> list[Instruction]:
        """As many as were asked for, or as many as there are to be had."""
        for _ in range(self._asker.config.rounds):
            open_places = [place for place in self._places() if self._lack(place) > 0]
            if not open_places:
                break
            await self._round(open_places)
            self._hand_on()
        lacking = self._data.instructions - sum(map(len, self._accepted))
        if lacking:
            reason = f"{lacking} of {self._data.instructions} instructions are missing: nothing new came"
            self._left_out.add(self._of, INSTRUCTIONS, reason)
        return await self._complicate([one for accepted in self._accepted for one in accepted])

    async def _round(self, places: list[int]) -> None:
        before = [len(accepted) for accepted in self._accepted]
        calls = [call for place in places for call in self._calls_for(place)]
        answers = await self._asker.ask_all([call for _, _, call in calls])
        new = []
        for (place, wanted, call), answer in zip(calls, answers, strict=True):
            self._left_out.faults(call, answer, self._leaves[place][0])
            for number, text in enumerate(answer.value or []):
                origin = FIRST if number < wanted else None
                if (one := self._take(place, text, origin, answer)) is not None:
                    new.append((place, one))
        if self._data.related.each:
            await self._related(new)
        for place in places:
            self._dry[place] = 0 if len(self._accepted[place]) > before[place] else self._dry[place] + 1

    def _calls_for(self, place: int) -> Iterator[tuple[int, int, Call]]:
        path, topic = self._leaves[place]
        seeds = -(-self._lack(place) // (1 + self._data.related.each))
        per_call = self._asker.config.step(self._of, INSTRUCTIONS).per_call
        firsts = [one.text for one in self._accepted[place] if one.origin == FIRST][-_SHOWN:]
        have = [" ".join(text.split())[:_SHOWN_CHARACTERS] for text in firsts]
        for number in range(min(-(-seeds // per_call), self._asker.config.calls_per_round)):
            wanted = min(per_call, seeds - number * per_call)
            prompt = self._render(INSTRUCTIONS, path, topic, number=wanted, have=have, call=self._calls[place])
            call = self._call(INSTRUCTIONS, prompt, self._calls[place], instruction_list(wanted))
            self._calls[place] += 1
            yield place, wanted, call

    async def _related(self, new: list[tuple[int, Instruction]]) -> None:
        related = self._data.related
        calls = []
        for place, one in new:
            path, topic = self._leaves[place]
            prompt = self._render(RELATED, path, topic, instruction=one.text, strong=related.strong, weak=related.weak)
            calls.append(self._call(RELATED, prompt, 0, instruction_list(related.each)))
        answers = await self._asker.ask_all(calls)
        for (place, one), call, answer in zip(new, calls, answers, strict=True):
            self._left_out.faults(call, answer, one.topic, one.text)
            origins = [STRONG] * related.strong + [WEAK] * related.weak
            for number, text in enumerate(answer.value or []):
                self._take(place, text, origins[number] if number < len(origins) else None, answer, one)

    def _take(
        self, place: int, text: str, origin: str | None, answer: Answer, parent: Instruction | None = None
    ) -> Instruction | None:
        """Accept a text, unless it is there already or one too many."""
        step, path = INSTRUCTIONS if parent is None else RELATED, self._leaves[place][0]
        if (fault := self._fault(text)) is not None:
            self._left_out.add(self._of, step, fault, " > ".join(path), text, answer.key)
            return None
        if origin is None or self._lack(place) <= 0:
            self._left_out.add(self._of, step, "more than asked for", " > ".join(path), text, answer.key)
            return None
        keys = (*(parent.keys if parent else ()), str(answer.key))
        one = Instruction(identity(text), text, path, origin, keys, parent.id if parent else None)
        self._duplicates.add(one.id, text)
        self._accepted[place].append(one)
        return one

    async def _complicate(self, pool: list[Instruction]) -> list[Instruction]:
        """A share of them, those whose ids come first: as many whatever the run, and the same ones."""
        chosen = {one.id for one in sorted(pool, key=lambda one: one.id)[: round(self._data.complicated * len(pool))]}
        places = [place for place, one in enumerate(pool) if one.id in chosen]
        prompts = [
            self._templates.render(COMPLICATED, domain=self._data.domain, instruction=pool[place].text)
            for place in places
        ]
        calls = [self._call(COMPLICATED, prompt, 0, one_text()) for prompt in prompts]
        for place, call, answer in zip(places, calls, await self._asker.ask_all(calls), strict=True):
            one = pool[place]
            self._left_out.faults(call, answer, one.topic, one.text)
            if answer.value is None:
                continue
            if (fault := self._fault(answer.value, one.id)) is not None:
                self._left_out.add(self._of, COMPLICATED, fault, " > ".join(one.topic), answer.value, answer.key)
                continue
            self._duplicates.add(one.id, answer.value)
            pool[place] = replace(one, text=answer.value, keys=(*one.keys, str(answer.key)), simpler=one.text)
        return pool

    def _fault(self, text: str, but: str | None = None) -> str | None:
        """Why a text is no instruction more; ``but`` is the one that it may repeat."""
        least = self._asker.config.least_words
        if count_words(text) < least:
            return f"fewer than {least} words"
        same = self._duplicates.match(text)
        return None if same in (None, but) else f"repeats: {same}"

    def _hand_on(self) -> None:
        """What sub-topics lack that have run dry goes to the others."""
        rest = 0
        for place in range(len(self._leaves)):
            if self._dry[place] >= _DRY_AFTER and self._lack(place) > 0:
                rest += self._lack(place)
                self._wanted[place] = len(self._accepted[place])
        open_places = self._places()
        if rest and open_places:
            for place, more in zip(open_places, spread(rest, len(open_places)), strict=True):
                self._wanted[place] += more

    def _places(self) -> list[int]:
        return [place for place in range(len(self._leaves)) if self._dry[place] < _DRY_AFTER]

    def _lack(self, place: int) -> int:
        return self._wanted[place] - len(self._accepted[place])

    def _render(self, step: str, path: tuple[str, ...], topic: Topic, **values: Any) -> str:
        return self._templates.render(step, domain=self._data.domain, topic=topic, path=path, **values)

    def _call(self, step: str, prompt: str, number: int, form: Any) -> Call:
        messages = ({"role": "user", "content": prompt},)
        return Call(self._of, step, messages, form, self._templates.version(step), number)


def identity(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
