"""What cleaning did, for people and for programs: counts of every rule and class, examples, what benchmarks are met."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from ultrafuser_mega.cleaning.contamination import Benchmarks, Hit
from ultrafuser_mega.cleaning.rules import RULES, Finding, Rules
from ultrafuser_mega.data.conversation import Conversation

_EXAMPLES = 5  # of every rule; of every benchmark and kind of match
_EXCERPT = 240  # characters
_FIRST = 96  # characters


class Report:
    """Counts that grow by the row.

    Attributes:
        read, kept: class -> rows.
        removed: rule -> class -> rows.
        examples: rule -> the first rows that it removed: class, place, why, question, reply.
        met: benchmark -> class -> how -> rows: "copy", "shared", "near" as hits are, "any": copied or shared. A row of
            several kinds counts for each.
        matches: (benchmark, how) -> the first of them: class, place, and what :class:`Hit` says.
    """

    def __init__(self, rules: Rules, benchmarks: Benchmarks | None = None) -> None:
        self.rules, self.benchmarks = rules, benchmarks
        self.read: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.removed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self.met: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self.matches: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def count(
        self,
        class_name: str,
        place: str,
        finding: Finding | None,
        conversation: Conversation | None = None,
        hits: Iterable[Hit] = (),
    ) -> None:
        """A row: where it is, why it was removed (None: it was kept), what it holds, what it shares with benchmarks."""
        self.read[class_name] += 1
        if finding is None:
            self.kept[class_name] += 1
        else:
            self.removed[finding.rule][class_name] += 1
            if len(examples := self.examples[finding.rule]) < _EXAMPLES:
                question, reply = conversation.turns[-1] if conversation is not None else ("", "")
                texts = {"question": _excerpt(question), "reply": _excerpt(reply)}
                examples.append({"class": class_name, "place": place, "why": finding.why, **texts})
        kinds: set[tuple[str, str]] = {(hit.benchmark, hit.how) for hit in hits}
        kinds |= {(hit.benchmark, "any") for hit in hits if hit.how != "near"}
        for benchmark, how in kinds:
            self.met[benchmark][class_name][how] += 1
        for hit in hits:
            if len(matches := self.matches[hit.benchmark, hit.how]) < _EXAMPLES:
                matches.append({"class": class_name, "place": place, **asdict(hit)})

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        benchmarks: dict[str, Any] = {}
        if self.benchmarks is not None:
            for name, count in self.benchmarks.items.items():
                met = {of: dict(counts) for of, counts in self.met.get(name, {}).items()}
                benchmarks[name] = {"items": count, "too_short": self.benchmarks.too_short.get(name, 0), "rows": met}
        rules = self.rules
        return {
            "rules": {
                "asked": [name for name in RULES if rules.asks(name)],
                "words": [rules.min_words, rules.max_words],
                "languages": list(rules.languages),
                "near": rules.near,
                "compared": rules.compared,
                "benchmarks": self.benchmarks and {"rule": self.benchmarks.rule, "share": self.benchmarks.share},
            },
            "rows": {name: {"read": read, "kept": self.kept[name]} for name, read in self.read.items()},
            "removed": {name: dict(self.removed[name]) for name in RULES if name in self.removed},
            "examples": {name: self.examples[name] for name in RULES if name in self.examples},
            "benchmarks": benchmarks,
            "matches": [match for matches in self.matches.values() for match in matches],
        }

    def tables(self) -> list[Table]:
        """Of rules by class, and where there are any, of benchmarks by class."""
        tables = [self._rules_table()]
        if self.benchmarks is not None:
            tables.append(self._benchmarks_table(self.benchmarks))
        return tables

    def _rules_table(self) -> Table:
        table = Table(title="Rows")
        table.add_column("", no_wrap=True)
        for name in self.read:
            table.add_column(Text(name), justify="right", no_wrap=True)
        table.add_column("the first", max_width=_FIRST)
        table.add_row("read", *(f"{count:,}" for count in self.read.values()), "")
        for rule in RULES:
            if self.rules.asks(rule) and not (rule == "language" and not self.rules.languages):
                cells = [f"{self.removed[rule][name]:,}" if rule in self.removed else "0" for name in self.read]
                example = self.examples[rule][0] if self.examples.get(rule) else None
                table.add_row(
                    rule, *cells, Text(_shortened(f"{example['place']}: {example['why']}") if example else "")
                )
        table.add_row("kept", *(f"{self.kept[name]:,}" for name in self.read), "")
        return table

    def _benchmarks_table(self, benchmarks: Benchmarks) -> Table:
        table = Table(title="Rows that meet a benchmark's items: copies / any 13-gram / near")
        for heading in ("benchmark", "items", "too short"):
            table.add_column(heading, justify="left" if heading == "benchmark" else "right")
        for name in self.read:
            table.add_column(Text(name), justify="right")
        for benchmark, count in benchmarks.items.items():
            cells = [_three(self.met[benchmark][name]) if benchmark in self.met else "0 / 0 / 0" for name in self.read]
            short = benchmarks.too_short.get(benchmark, 0)
            table.add_row(Text(benchmark), f"{count:,}", f"{short:,}", *cells)
        return table


def _three(counts: Counter[str]) -> str:
    return f"{counts['copy']:,} / {counts['any']:,} / {counts['near']:,}"


def _shortened(text: str) -> str:
    """The end of a long one: places begin alike."""
    return text if len(text) <= _FIRST else ".." + text[2 - _FIRST :]


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXCERPT else flat[: _EXCERPT - 2] + ".."
