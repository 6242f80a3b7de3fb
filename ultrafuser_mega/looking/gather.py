"""One pass over rows: how many there are of every topic, how long they are, and some of each to look at."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ultrafuser_mega.looking.places import Seen

BINS = 26  # lengths, each sqrt(2) as long as the one before; the last takes all that are longer
_MOST_OF_A_TOPIC = 100
_SEED = 0


@dataclass
class OfClass:
    """What is counted of a class.

    Attributes:
        rows, turns, words: of all of it; words of replies.
        topics: path -> rows.
        lengths: "question" or "reply" -> rows or replies by ``bin_of`` their words.
    """

    rows: int = 0
    turns: int = 0
    words: int = 0
    topics: Counter[tuple[str, ...]] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {name: [0] * BINS for name in ("question", "reply")})


@dataclass
class Gathered:
    """What is shown of rows: counts by class, ``samples`` of all topics, how many rows were no conversations."""

    classes: dict[str, OfClass]
    samples: list[Seen]
    malformed: int


def gather(rows: Iterable[Seen | None], samples: int) -> Gathered:
    """Count rows and draw ``samples`` of them, as evenly over their topics as there are rows of these.

    What is drawn depends on the rows alone.
    """
    classes: dict[str, OfClass] = {}
    by_topic: dict[tuple[str, ...], list[Seen]] = {}
    generator = random.Random(_SEED)
    malformed = 0
    for row in rows:
        if row is None:
            malformed += 1
            continue
        of = classes.setdefault(row.class_name, OfClass())
        of.rows += 1
        of.turns += len(row.conversation.turns)
        of.topics[row.topic] += 1
        of.lengths["question"][bin_of(sum(len(user.split()) for user, _ in row.conversation.turns))] += 1
        for _, assistant in row.conversation.turns:
            count = len(assistant.split())
            of.words += count
            of.lengths["reply"][bin_of(count)] += 1
        some = by_topic.setdefault((row.class_name, *row.topic), [])
        _draw(some, row, of.topics[row.topic], _MOST_OF_A_TOPIC, generator)
    return Gathered(classes, _even(list(by_topic.values()), samples), malformed)


def drawn(rows: Iterable[Seen | None], count: int) -> dict[str, list[Seen]]:
    """Class -> ``count`` of its rows, or all of fewer, each as likely as any other."""
    found: dict[str, list[Seen]] = {}
    passed: Counter[str] = Counter()
    generator = random.Random(_SEED)
    for row in rows:
        if row is None:
            continue
        passed[row.class_name] += 1
        _draw(found.setdefault(row.class_name, []), row, passed[row.class_name], count, generator)
    return found


def _draw(some: list[Seen], row: Seen, number: int, most: int, generator: random.Random) -> None:
    """Have ``row``, the ``number``-th, in ``some`` as likely as any before it (Vitter 1985, algorithm R)."""
    if len(some) < most:
        some.append(row)
    elif (place := generator.randrange(number)) < most:
        some[place] = row


def bin_of(words: int) -> int:
    """Where a length is counted: bin k begins at 2**(k/2) words; 0 words are in the first."""
    return min(BINS - 1, int(2 * math.log2(words) + 1e-9)) if words > 0 else 0


def _even(groups: list[list[Seen]], count: int) -> list[Seen]:
    """``count`` of them, one of each group after the other, in the order of the groups."""
    taken = [0] * len(groups)
    left = min(count, sum(map(len, groups)))
    while left:
        for place, group in enumerate(groups):
            if left and taken[place] < len(group):
                taken[place] += 1
                left -= 1
    return [row for group, number in zip(groups, taken, strict=True) for row in group[:number]]
