"""Rows judged one after the other: what is kept, what is removed and by which rule.

kept, removed, report = clean(rows, Rules())

What a single row shows (``Cleaner.examine``) depends on nothing else and may be asked anywhere; whether it repeats an
earlier one (``Cleaner.repeats``) is asked in the rows' order and of kept rows alone, so the first of several copies is
the one that is kept, and a second cleaning removes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ultrafuser_mega.cleaning.contamination import Benchmarks, Hit
from ultrafuser_mega.cleaning.duplicates import NearDuplicates, digest_of
from ultrafuser_mega.cleaning.language import check_languages
from ultrafuser_mega.cleaning.replies import find_in_replies
from ultrafuser_mega.cleaning.report import Report
from ultrafuser_mega.cleaning.rules import CONTAMINATED, EXACT, MALFORMED, NEAR, Finding, Rules
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation


class Removed(NamedTuple):
    """A row that was removed, as it came, and why."""

    row: Any
    finding: Finding


class Cleaned(NamedTuple):
    """``kept`` and ``removed`` in the order in which the rows came: together all of them."""

    kept: list[Any]
    removed: list[Removed]
    report: Report


@dataclass(frozen=True, slots=True)
class Examined:
    """What a row shows by itself: why it goes (None: it may stay), and what it shares with benchmarks."""

    finding: Finding | None
    hits: tuple[Hit, ...] = ()


class Cleaner:
    """The rules, and what has been kept so far.

    Args:
        rules: to ask.
        benchmarks: whose items must not stand in the rows; None: none.
    """

    def __init__(self, rules: Rules, benchmarks: Benchmarks | None = None) -> None:
        check_languages(rules.languages)
        self.rules = rules
        self.benchmarks = benchmarks if rules.asks(CONTAMINATED) else None
        self._seen: dict[int, str] = {}
        self._near = NearDuplicates(rules.near) if rules.asks(NEAR) else None

    def examine(self, conversation: Conversation) -> Examined:
        """Ask all rules that concern a row by itself."""
        finding = find_in_replies(conversation, self.rules)
        hits: tuple[Hit, ...] = ()
        if self.benchmarks is not None:
            hits = tuple(self.benchmarks.search(conversation))
            worst = next((hit for hit in hits if hit.removes), None)
            if finding is None and worst is not None:
                finding = Finding(CONTAMINATED, str(worst))
        return Examined(finding, hits)

    def repeats(self, key: str, conversation: Conversation) -> Finding | None:
        """Ask whether a row repeats one that was kept; where it does not it is kept in mind as ``key``."""
        texts = _texts(conversation) if self.rules.compared == "conversation" else _questions(conversation)
        digest = digest_of(texts) if self.rules.asks(EXACT) else 0
        if self.rules.asks(EXACT) and (first := self._seen.get(digest)) is not None:
            return Finding(EXACT, f"as {first}")
        if self._near is not None and (match := self._near.match_or_add(key, "\n".join(texts))) is not None:
            return Finding(NEAR, f"{match.similarity:.2f} as {match.key}")
        if self.rules.asks(EXACT):
            self._seen[digest] = key
        return None


def clean(rows: Iterable[Any], rules: Rules, benchmarks: Benchmarks | None = None) -> Cleaned:
    """Clean rows that are in memory; files.py cleans files of any size.

    Args:
        rows: of any shape that data/conversation.py knows; ``class``, where a row or its ``provenance`` has
            it, is what it is counted under.
        rules: to ask.
        benchmarks: whose items must not stand in the rows.
    """
    cleaner, report = Cleaner(rules, benchmarks), Report(rules, benchmarks)
    kept: list[Any] = []
    removed: list[Removed] = []
    for number, row in enumerate(rows, start=1):
        name, place = class_of(row), f"row {number}"
        try:
            conversation = to_conversation(row)
        except MalformedRowError as error:
            finding: Finding | None = Finding(MALFORMED, str(error))
            report.count(name, place, finding)
        else:
            examined = cleaner.examine(conversation)
            finding = examined.finding or cleaner.repeats(place, conversation)
            report.count(name, place, finding, conversation, examined.hits)
        if finding is None:
            kept.append(row)
        else:
            removed.append(Removed(row, finding))
    return Cleaned(kept, removed, report)


def class_of(row: Any) -> str:
    """The class that a row, or its provenance, says it is of; "all" where neither says anything."""
    holders = (row, row.get("provenance")) if isinstance(row, dict) else ()
    names = (holder.get("class") for holder in holders if isinstance(holder, dict))
    return next((name for name in names if isinstance(name, str) and name), "all")


def _questions(conversation: Conversation) -> list[str]:
    return [user for user, _ in conversation.turns]


def _texts(conversation: Conversation) -> list[str]:
    """All that is said, in order."""
    system = [conversation.system] if conversation.system else []
    return system + [text for turn in conversation.turns for text in turn]
