"""One pass over the source files into the arrays of a store: read, check, align, write, in batches.

Memory hardly depends on the size of the files: 20 bytes are kept per row, to find repeated ones. Every row
ends in exactly one place: a sample of its split, or a line of dropped.jsonl that names file, line, row and
reason, and a count under that reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ultrafuser_mega.data.align import Aligner, Dropped
from ultrafuser_mega.data.columns import renamed
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.progress import reading_bar
from ultrafuser_mega.data.readers import Row, read_rows
from ultrafuser_mega.data.repeats import Repeats
from ultrafuser_mega.data.store import DROPPED, SPLITS
from ultrafuser_mega.data.store_writer import SplitWriter, token_dtype
from ultrafuser_mega.data.unread import unread_fields
from ultrafuser_mega.errors import InputError

MALFORMED = "malformed"
_BATCH_ROWS = 512
_EXAMPLES = 3  # rows named per reason in the report; dropped.jsonl names them all
_TOLD = 10  # malformed rows of a file that are named where they end the work


@dataclass(frozen=True)
class Source:
    """One file of one class; its first ``holdout`` rows (None: all) go to the held-out split.

    ``columns``: the file's own names for the fields of a row, see columns.py. ``entry``: which of the class's entries
    it is of, training files and held-out ones counted apart.
    """

    class_name: str
    path: Path
    holdout: int | None
    columns: Mapping[str, str] = field(default_factory=dict)
    entry: int = 0

    def split_of(self, row: Row) -> str:
        return "heldout" if self.holdout is None or row.number <= self.holdout else "train"


def write_splits(
    folder: Path, sources: Sequence[Source], aligner: Aligner, on_malformed: str, progress: bool
) -> dict[str, dict[str, Any]]:
    """Write every class's two splits and dropped.jsonl under ``folder``; {class: {split: manifest part}}.

    Raises InputError that names the malformed rows of every file, the first of each, if ``on_malformed`` is "fail".
    """
    classes = dict.fromkeys(source.class_name for source in sources)
    dtype = token_dtype(aligner.vocab_size)
    repeats, malformed = Repeats(), _Malformed(on_malformed == "fail")
    with ExitStack() as stack:
        dropped = stack.enter_context((folder / DROPPED).open("w", encoding="utf-8"))
        show = stack.enter_context(reading_bar([source.path for source in sources], "tokenising", progress))
        parts: _Parts = {}
        for name, split in ((name, split) for name in classes for split in SPLITS):
            writer = stack.enter_context(SplitWriter(folder / name / split, list(aligner.encoders), dtype))
            parts[name, split] = _Part(name, split, writer, dropped)
        for number, source in enumerate(sources):
            rows = _conversations(source, parts, malformed)
            while batch := list(islice(rows, _BATCH_ROWS)):
                _write_batch(number, source, batch, aligner, parts, repeats)
                show(batch[-1][0].end_byte)
            if source.holdout is not None:
                parts[source.class_name, "train"].of_entry(source)
            show(None)
        malformed.refuse()
        for split in SPLITS:
            for number, line, row in repeats.found(split):
                parts[sources[number].class_name, split].repeat(f"{sources[number].path}:{line} (row {row})")
        return {name: {split: parts[name, split].close() for split in SPLITS} for name in classes}


@dataclass
class _Part:
    """One class's split while it is written: the arrays and the counts."""

    class_name: str
    split: str
    writer: SplitWriter
    dropped_file: TextIO
    rows: int = 0
    kept: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    entries: list[int] = field(default_factory=list)
    repeated: int = 0
    repeated_examples: list[str] = field(default_factory=list)

    def drop(self, source: Source, row: Row, dropped: Dropped) -> None:
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        examples = self.examples.setdefault(dropped.reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{_place(source, row)}: {dropped.detail}")
        entry = {
            "class": self.class_name,
            "split": self.split,
            "file": str(source.path),
            "line": row.line,
            "row": row.number,
            "reason": dropped.reason,
            "detail": dropped.detail,
        }
        self.dropped_file.write(json.dumps(entry) + "\n")

    def repeat(self, place: str) -> None:
        self.repeated += 1
        if len(self.repeated_examples) < _EXAMPLES:
            self.repeated_examples.append(place)

    def of_entry(self, source: Source) -> None:
        """What was added since the last call is of the source's entry."""
        self.entries += [0] * (source.entry + 1 - len(self.entries))
        self.entries[source.entry] += self.writer.samples - sum(self.entries)

    def close(self) -> dict[str, Any]:
        return {
            **({"entries": self.entries} if self.split == "train" else {}),
            "rows": self.rows,
            "kept": self.kept,
            "samples": self.writer.samples,
            "cut": self.cut,
            "dropped": self.dropped,
            "dropped_examples": self.examples,
            "unread": dict(self.unread),
            "repeated": self.repeated,
            "repeated_examples": self.repeated_examples,
            **self.writer.close(),
        }


_Parts = dict[tuple[str, str], _Part]


@dataclass
class _Malformed:
    """The malformed rows of all files, where they end the work: what is wrong with the first of each, and how many."""

    are_fatal: bool
    files: dict[Path, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def ends_the_work(self) -> bool:
        """Whether it is known by now that there will be no store."""
        return self.are_fatal and bool(self.files)

    def add(self, source: Source, row: Row, reason: str) -> None:
        self.files[source.path] = self.files.get(source.path, 0) + 1
        if self.files[source.path] <= _TOLD:
            self.told.append(f"{_place(source, row)}: {reason}")

    def end_file(self, source: Source) -> None:
        if (more := self.files.get(source.path, 0) - _TOLD) > 0:
            self.told.append(f"and {more} more in {source.path}")

    def refuse(self) -> None:
        if self.ends_the_work:
            raise InputError(
                f"{'; '.join(self.told)}; mend the {sum(self.files.values())} malformed row(s), "
                "or leave them out with data.on_malformed: skip"
            )


def _conversations(source: Source, parts: _Parts, malformed: _Malformed) -> Iterator[tuple[Row, Conversation]]:
    """The rows that are conversations, counted; the others are dropped and noted.

    None is given once a malformed one ends the work: from there on rows are only looked at, to tell all at once.
    """
    rows = 0
    for row in read_rows(source.path):
        rows = row.number
        part = parts[source.class_name, source.split_of(row)]
        part.rows += 1
        try:
            if row.problem:
                raise MalformedRowError(row.problem)
            conversation = to_conversation(renamed(row.value, source.columns))
        except MalformedRowError as error:
            part.drop(source, row, Dropped(MALFORMED, str(error)))
            malformed.add(source, row, str(error))
            continue
        part.unread.update(unread_fields(row.value, source.columns))
        if not malformed.ends_the_work:
            yield row, conversation
    malformed.end_file(source)
    if source.holdout is not None and source.holdout > rows:
        raise InputError(f"{source.path}: {source.holdout} first rows are to be held out, and it has {rows}")


def _write_batch(
    number: int,
    source: Source,
    batch: Sequence[tuple[Row, Conversation]],
    aligner: Aligner,
    parts: _Parts,
    repeats: Repeats,
) -> None:
    results = aligner.align([conversation for _, conversation in batch])
    for split in SPLITS:
        part = parts[source.class_name, split]
        kept = []
        for (row, conversation), result in zip(batch, results, strict=True):
            if source.split_of(row) != split:
                continue
            if isinstance(result, Dropped):
                part.drop(source, row, result)
            else:
                kept.append(result)
                part.cut += result.was_cut
                repeats.add(split, (number, row.line, row.number), conversation)
        part.kept += len(kept)
        part.writer.add(kept)


def _place(source: Source, row: Row) -> str:
    return f"{source.path}:{row.line} (row {row.number})"
