"""One pass over the source files into the arrays of a store: read, check, align, write, in batches.

Memory does not depend on the size of the files. Every row ends in exactly one place: a sample of its
split, or a line of dropped.jsonl that names file, line, row and reason, and a count under that reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ultrafuser_mega.data.align import Aligner, Dropped
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.readers import Row, read_rows
from ultrafuser_mega.data.store import DROPPED, SPLITS
from ultrafuser_mega.data.store_writer import SplitWriter, token_dtype
from ultrafuser_mega.errors import InputError

MALFORMED = "malformed"
_BATCH_ROWS = 512
_EXAMPLES = 3  # rows named per reason in the report; dropped.jsonl names them all


@dataclass(frozen=True)
class Source:
    """One file of one class; its first ``holdout`` rows (None: all) go to the held-out split."""

    class_name: str
    path: Path
    holdout: int | None

    def split_of(self, row: Row) -> str:
        return "heldout" if self.holdout is None or row.number <= self.holdout else "train"


def write_splits(
    folder: Path, sources: Sequence[Source], aligner: Aligner, on_malformed: str, progress: bool
) -> dict[str, dict[str, Any]]:
    """Write every class's two splits and dropped.jsonl under ``folder``; {class: {split: manifest part}}.

    Raises InputError at the first malformed row if ``on_malformed`` is "fail".
    """
    classes = dict.fromkeys(source.class_name for source in sources)
    dtype = token_dtype(aligner.vocab_size)
    with ExitStack() as stack:
        dropped = stack.enter_context((folder / DROPPED).open("w", encoding="utf-8"))
        show = stack.enter_context(_progress_bar(sources, progress))
        parts = {}
        for name, split in ((name, split) for name in classes for split in SPLITS):
            writer = stack.enter_context(SplitWriter(folder / name / split, list(aligner.encoders), dtype))
            parts[name, split] = _Part(name, split, writer, dropped)
        for source in sources:
            batch: list[tuple[Row, Conversation]] = []
            for row in read_rows(source.path):
                part = parts[source.class_name, source.split_of(row)]
                part.rows += 1
                try:
                    if row.problem:
                        raise MalformedRowError(row.problem)
                    batch.append((row, to_conversation(row.value)))
                except MalformedRowError as error:
                    if on_malformed == "fail":
                        raise InputError(f"{_place(source, row)}: {error}") from None
                    part.drop(source, row, Dropped(MALFORMED, str(error)))
                if len(batch) == _BATCH_ROWS:
                    _write_batch(source, batch, aligner, parts)
                    batch = []
                    show(row.end_byte)
            _write_batch(source, batch, aligner, parts)
            show(None)
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

    def close(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "samples": self.writer.samples,
            "cut": self.cut,
            "dropped": self.dropped,
            "dropped_examples": self.examples,
            **self.writer.close(),
        }


def _write_batch(
    source: Source,
    batch: Sequence[tuple[Row, Conversation]],
    aligner: Aligner,
    parts: dict[tuple[str, str], _Part],
) -> None:
    results = aligner.align([conversation for _, conversation in batch])
    for split in SPLITS:
        part = parts[source.class_name, split]
        kept = []
        for (row, _), result in zip(batch, results, strict=True):
            if source.split_of(row) != split:
                continue
            if isinstance(result, Dropped):
                part.drop(source, row, result)
            else:
                kept.append(result)
                part.cut += result.was_cut
        part.kept += len(kept)
        part.writer.add(kept)


def _place(source: Source, row: Row) -> str:
    return f"{source.path}:{row.line} (row {row.number})"


@contextmanager
def _progress_bar(sources: Sequence[Source], wanted: bool) -> Iterator[Callable[[int | None], None]]:
    """Yields show(bytes read of the current file, or None when it is done); a bar on stderr if wanted."""
    sizes = [source.path.stat().st_size for source in sources]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not wanted) as bar:
        task = bar.add_task("tokenising", total=sum(sizes))
        done = 0
        files = iter(sizes)

        def show(read: int | None) -> None:
            nonlocal done
            if read is None:
                done += next(files)
            bar.update(task, completed=done + (read or 0))

        yield show
