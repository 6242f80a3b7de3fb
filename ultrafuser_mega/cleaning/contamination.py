"""Items of benchmarks in training rows, found by the word 13-grams that both have (UltraFuser, appendix C).

The paper names 13-grams and no more. Any that a row shares with an item (rule "any") is its literal reading, and marks
innocent rows by phrases that everybody writes ("a time complexity of O(n) where n is the length of"). So by default
(rule "share") a row goes where it holds at least half of the 13-grams of an item's question or of its answer. Questions
of fewer than 13 words have none: they are looked for as a whole, from five words on, in what a row's user says. What is
shared but for numbers is listed as near and removes nothing, since exercises often differ in nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ultrafuser_mega.cleaning.words import words
from ultrafuser_mega.data.conversation import Conversation
from ultrafuser_mega.errors import InputError

GRAM = 13  # words
SHORTEST = 5  # words of what is looked for as a whole
RuleName = Literal["share", "any"]
Kind = Literal["question", "answer"]
_SHOWN = 60  # words of a match
_NUMBER = "0"

Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BenchmarkText:
    """An item as its file has it, without the words in which a model is asked.

    ``answer`` may be empty; one of fewer than 13 words is not looked for.
    """

    benchmark: str
    id: str
    question: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a row shares with one part of one item.

    Attributes:
        benchmark, id, part: where it is from.
        how: "copy": the row is one by the rule; "shared": it has a 13-gram of it; "near": a copy but for the numbers.
        share: of the part's 13-grams.
        text: the longest run of words that both have, beginning at most.
        removes: whether the row goes for it.
    """

    benchmark: str
    id: str
    part: Kind
    how: Literal["copy", "shared", "near"]
    share: float
    text: str
    removes: bool

    def __str__(self) -> str:
        return f"{self.share:.0%} of the {self.part} of {self.id}: {self.text!r}"


@dataclass(frozen=True, slots=True)
class _Part:
    benchmark: str
    id: str
    part: Kind
    words: Gram


class _Index:
    """Parts by their 13-grams, short ones by their first words.

    Args:
        parts: all of five words or more.
        least: words of a 13-gram that are no masked numbers; others say nothing.
    """

    def __init__(self, parts: Sequence[_Part], least: int = 0) -> None:
        self.parts = parts
        self._sizes: list[int] = []
        self._grams: dict[Gram, list[int]] = {}
        self._short: dict[Gram, list[int]] = {}
        for place, part in enumerate(parts):
            grams = {gram for gram in _grams(part.words, GRAM) if GRAM - gram.count(_NUMBER) >= least}
            self._sizes.append(len(grams))
            for gram in grams:
                self._grams.setdefault(gram, []).append(place)
            if len(part.words) < GRAM:
                self._short.setdefault(part.words[:SHORTEST], []).append(place)

    def find(self, said: Sequence[str], asked: Sequence[str]) -> Iterator[tuple[int, float, str]]:
        """(part, share of its 13-grams, longest run in common) for all that a row shares anything with.

        Args:
            said: all its words.
            asked: its user's.
        """
        if not self._grams.keys().isdisjoint(_grams(said, GRAM)):
            yield from self._shared(said)
        if not self._short.keys().isdisjoint(_grams(asked, SHORTEST)):
            yield from self._whole(asked)

    def _shared(self, said: Sequence[str]) -> Iterator[tuple[int, float, str]]:
        shared: defaultdict[int, set[Gram]] = defaultdict(set)
        runs: dict[int, list[int]] = {}  # part -> begin, end of the run now; begin, end of the longest
        for start, gram in enumerate(_grams(said, GRAM)):
            for place in self._grams.get(gram, ()):
                shared[place].add(gram)
                run = runs.setdefault(place, [start, start, start, start])
                if run[1] != start - 1:
                    run[0] = start
                run[1] = start
                if run[1] - run[0] >= run[3] - run[2]:
                    run[2:] = run[:2]
        for place, grams in shared.items():
            _, _, begin, end = runs[place]
            yield place, len(grams) / self._sizes[place], " ".join(said[begin : end + GRAM][:_SHOWN])

    def _whole(self, asked: Sequence[str]) -> Iterator[tuple[int, float, str]]:
        told: set[int] = set()
        for start, gram in enumerate(_grams(asked, SHORTEST)):
            for place in self._short.get(gram, ()):
                whole = self.parts[place].words
                if place not in told and tuple(asked[start : start + len(whole)]) == whole:
                    told.add(place)
                    yield place, 1.0, " ".join(whole)


class Benchmarks:
    """Items that must not be trained on.

    Args:
        items: of any benchmarks.
        rule: "share": a row goes that has at least ``share`` of a part's 13-grams; "any": one that has any.
        share: see there; above 0, at most 1.

    Attributes:
        items: benchmark -> how many.
        too_short: benchmark -> how many of them have questions of fewer than five words, which are not looked for.

    Raises:
        InputError: no item, another rule or share.
    """

    def __init__(self, items: Iterable[BenchmarkText], rule: RuleName = "share", share: float = 0.5) -> None:
        if rule not in ("share", "any"):
            raise InputError(f"rule {rule!r}: expected share or any")
        if not 0 < share <= 1:
            raise InputError(f"share {share}: expected a number above 0, at most 1")
        self.rule, self.share = rule, share
        counts: Counter[str] = Counter()
        short: Counter[str] = Counter()
        parts: dict[_Part, None] = {}
        for item in items:
            counts[item.benchmark] += 1
            question, answer = tuple(words(item.question)), tuple(words(item.answer))
            if len(question) < SHORTEST:
                short[item.benchmark] += 1
            else:
                parts[_Part(item.benchmark, item.id, "question", question)] = None
            if len(answer) >= GRAM:
                parts[_Part(item.benchmark, item.id, "answer", answer)] = None
        if not counts:
            raise InputError("benchmarks: no item to look for")
        self.items: Mapping[str, int] = counts
        self.too_short: Mapping[str, int] = short
        self._index = _Index(list(parts))
        # But for its numbers, the answer to another exercise is the same; one without numbers was looked for already.
        masked = [_Part(part.benchmark, part.id, part.part, _masked(part.words)) for part in parts]
        numbers = [part.words.count(_NUMBER) if part.part == "question" else 0 for part in masked]
        near = [part for part, count in zip(masked, numbers, strict=True) if 0 < count <= len(part.words) - SHORTEST]
        self._masked = _Index(near, least=SHORTEST)

    def search(self, conversation: Conversation) -> list[Hit]:
        """All that a row shares with items; copies first, the larger shares first."""
        system = words(conversation.system or "")
        turns = [(words(user), words(assistant)) for user, assistant in conversation.turns]
        said = [*system, *(word for turn in turns for text in turn for word in text)]
        asked = [*system, *(word for user, _ in turns for word in user)]
        hits = [
            self._hit(self._index.parts[place], share, text) for place, share, text in self._index.find(said, asked)
        ]
        copies = {(hit.id, hit.part) for hit in hits if hit.how == "copy"}
        masked = _masked(said)
        for place, share, text in self._masked.find(masked, _masked(asked)) if _NUMBER in masked else ():
            part = self._masked.parts[place]
            if share >= self.share and (part.id, part.part) not in copies:
                hits.append(Hit(part.benchmark, part.id, part.part, "near", share, text, removes=False))
        return sorted(hits, key=lambda hit: (not hit.removes, hit.how, -hit.share, hit.id))

    def _hit(self, part: _Part, share: float, text: str) -> Hit:
        is_copy = share >= self.share
        how: Literal["copy", "shared"] = "copy" if is_copy else "shared"
        return Hit(part.benchmark, part.id, part.part, how, share, text, removes=is_copy or self.rule == "any")


def _grams(found: Sequence[str], n: int) -> Iterator[Gram]:
    return zip(*(found[start:] for start in range(n)), strict=False)


def _masked(found: Iterable[str]) -> Gram:
    """The words with 0 for each that has a digit in it."""
    return tuple(word if word.isalpha() or not any(map(str.isdigit, word)) else _NUMBER for word in found)
