"""What preparing a store did, for people: rows kept and dropped, why, token counts, and what in the data looks odd."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ultrafuser_mega.data.store import DROPPED, SPLITS


@dataclass(frozen=True)
class PrepareReport:
    """``manifest`` is the store's; ``reused`` says that the store was there already, from the same inputs."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool

    def counts(self, class_name: str, split: str) -> dict[str, Any]:
        """rows, kept, cut, dropped, unread, repeated, response_tokens, prompt_tokens: see store_writer.py."""
        counts: dict[str, Any] = self.manifest["splits"][class_name][split]
        return counts

    def table(self) -> Table:
        """A rich table, one row per class and split."""
        title = f"{self.folder}" + (" (made before from the same inputs)" if self.reused else "")
        table = Table(title=escape(title))  # a folder may have [brackets] in its name
        for heading in ("class", "split"):
            table.add_column(heading)
        for heading in ("rows", "kept", "cut at max_length", "response tokens"):
            table.add_column(heading, justify="right")
        for name in self.manifest["specialists"]:
            table.add_column(f"prompt tokens {name}", justify="right")
        table.add_column("dropped")
        for class_name in self.manifest["classes"]:
            for split in SPLITS:
                counts = self.counts(class_name, split)
                numbers = [counts[key] for key in ("rows", "kept", "cut", "response_tokens")]
                numbers += counts["prompt_tokens"].values()
                dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
                table.add_row(class_name, split, *(f"{number:,}" for number in numbers), dropped)
        return table

    def endings(self) -> str:
        """A line on what every response ends with, and whose template ends a turn otherwise."""
        ends: dict[str, str] = self.manifest["inputs"]["responses"]["ends"]
        first = next(iter(ends))
        others = [f"{name} with {end}" for name, end in ends.items() if end != ends[first]]
        line = f"responses end with {ends[first]}, as {first}'s template ends a turn"
        return f"{line}; the templates of others end one otherwise: {', '.join(others)}" if others else line

    def problems(self) -> list[str]:
        """The first rows dropped under each reason, and where all of them are named; [] if none was."""
        lines = []
        for class_name in self.manifest["classes"]:
            for split in SPLITS:
                counts = self.counts(class_name, split)
                for reason, examples in counts["dropped_examples"].items():
                    lines += [f"{reason}: {example}" for example in examples]
                    unnamed = counts["dropped"][reason] - len(examples)
                    if unnamed:
                        lines.append(f"{reason}: {unnamed} more in {class_name} {split}")
        return [*lines, f"all dropped rows: {self.folder / DROPPED}"] if lines else []

    def notices(self) -> list[str]:
        """A line for each thing about the rows that were kept which nobody may have meant; [] if there is none."""
        lines = []
        for name in self.manifest["classes"]:
            unread = sum((Counter(self.counts(name, split)["unread"]) for split in SPLITS), Counter[str]())
            for field, rows in unread.items():
                lines.append(f"{name}: field {field} is not read, it holds content in {rows:,} row(s)")
            train, heldout = (self.counts(name, split) for split in SPLITS)
            if train["repeated"]:
                lines.append(
                    f"{name}: {train['repeated']:,} of {train['kept']:,} training rows repeat an earlier one"
                    + _named(train["repeated_examples"])
                )
            if heldout["repeated"]:
                lines.append(
                    f"{name}: {heldout['repeated']:,} of {heldout['kept']:,} held-out rows are also trained on"
                    + _named(heldout["repeated_examples"])
                )
        return lines


def _named(places: list[str]) -> str:
    return f", as {', '.join(places)}"
