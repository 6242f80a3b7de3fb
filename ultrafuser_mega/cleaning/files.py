"""Files of rows cleaned into a folder, of any size: what ``ultrafuser clean`` does.

    kept/NAME.jsonl   what is kept, file by file, ready for ``ultrafuser prepare``
    removed.jsonl     what is not: class, file, number in it, rule, why, and the row
    matches.jsonl     all that rows share with benchmarks' items, whether it removed them or not
    report.json       counts, examples, which file is which

A line of JSONL is kept byte by byte; a row of a JSON array or of Parquet becomes a line with the same values. Rows are
examined by several processes and judged in their order, so the result does not depend on how many there are. In memory
lie the signatures of kept rows, some 2 kB each, and a few batches.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ultrafuser_mega.cleaning.clean import Cleaner, Examined, class_of
from ultrafuser_mega.cleaning.contamination import Benchmarks
from ultrafuser_mega.cleaning.report import Report
from ultrafuser_mega.cleaning.rules import MALFORMED, Finding, Rules
from ultrafuser_mega.data.columns import renamed
from ultrafuser_mega.data.conversation import Conversation, MalformedRowError, to_conversation
from ultrafuser_mega.data.files import find_format
from ultrafuser_mega.data.folders import move_into_place, work_folder
from ultrafuser_mega.data.progress import reading_bar
from ultrafuser_mega.data.readers import Row, read_rows
from ultrafuser_mega.errors import InputError, writing

KEPT, REMOVED, MATCHES, REPORT = "kept", "removed.jsonl", "matches.jsonl", "report.json"
_BATCH_ROWS = 256
_SUFFIXES = (".gz", ".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Source:
    """A file. ``class_name``: of all its rows; None: what each row says, see clean.class_of. ``columns``: its own names
    for the fields of a row, see data/columns.py."""

    path: Path
    class_name: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Read:
    """A row as it was read; ``conversation`` is None where it is malformed, ``problem`` says how."""

    row: Row
    class_name: str
    conversation: Conversation | None
    problem: str


def clean_files(
    sources: Sequence[Source],
    out: Path,
    rules: Rules,
    benchmarks: Benchmarks | None = None,
    *,
    processes: int | None = None,
    progress: bool = False,
) -> Report:
    """Clean files into the new folder ``out``, which gets its name when it is complete.

    Args:
        sources: the files, in the order in which of two copies the first is kept.
        out: the folder.
        rules, benchmarks: see clean.clean.
        processes: that examine rows; None: one to each core; 1: this one.
        progress: show a bar on stderr.

    Raises:
        InputError: no file, one that cannot be read, a folder that exists, a disk that is full.
    """
    if not sources:
        raise InputError("clean: no file to clean")
    if out.exists():
        raise InputError(f"{out}: exists already; nothing is overwritten, choose another name or remove it")
    for source in sources:
        find_format(source.path)
    names = _kept_names([source.path for source in sources])
    cleaner, report = Cleaner(rules, benchmarks), Report(rules, benchmarks)
    with writing(out, as_whole=True):
        out.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(out) as work, ExitStack() as stack:
            examine = stack.enter_context(_examiners(cleaner, processes or len(os.sched_getaffinity(0))))
            show = stack.enter_context(reading_bar([source.path for source in sources], "cleaning", progress))
            removed = stack.enter_context((work / REMOVED).open("w", encoding="utf-8"))
            matches = stack.enter_context((work / MATCHES).open("w", encoding="utf-8"))
            for source, name in zip(sources, names, strict=True):
                target = work / KEPT / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as kept:
                    _clean_file(source, cleaner, report, examine(_batches(source)), (kept, removed, matches), show)
            files = [
                {"file": f"{KEPT}/{name.as_posix()}", "class": source.class_name, "from": str(source.path)}
                for source, name in zip(sources, names, strict=True)
            ]
            whole = {**report.as_json(), "files": files}
            (work / REPORT).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            stack.close()
            move_into_place(work, out)
    return report


def _clean_file(
    source: Source,
    cleaner: Cleaner,
    report: Report,
    batches: Iterable[tuple[list[_Read], list[Examined]]],
    files: tuple[BinaryIO, TextIO, TextIO],
    show: Callable[[int | None], None],
) -> None:
    kept, removed, matches = files
    for batch, results in batches:
        for read, examined in zip(batch, results, strict=True):
            lines = read.row.raw is not None
            place = f"{source.path}:{read.row.line}" if lines else f"{source.path} row {read.row.number}"
            if read.conversation is None:
                finding: Finding | None = Finding(MALFORMED, read.problem)
            else:
                finding = examined.finding or cleaner.repeats(place, read.conversation)
            report.count(read.class_name, place, finding, read.conversation, examined.hits)
            where = {"class": read.class_name, "file": str(source.path), "number": read.row.number}
            for hit in examined.hits:
                matches.write(json.dumps({**where, **asdict(hit)}) + "\n")
            if finding is None:
                kept.write(_line(read.row) + b"\n")
            else:
                as_read: dict[str, Any] = {"row": read.row.value}
                if read.row.problem is not None and read.row.raw is not None:
                    as_read = {"text": read.row.raw.decode("utf-8", "surrogateescape")}
                removed.write(json.dumps({**where, "rule": finding.rule, "why": finding.why, **as_read}) + "\n")
        show(batch[-1].row.end_byte)
    show(None)


def _batches(source: Source) -> Iterator[list[_Read]]:
    rows = (_read(source, row) for row in read_rows(source.path))
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _read(source: Source, row: Row) -> _Read:
    name = source.class_name or class_of(row.value)
    if row.problem is not None:
        return _Read(row, name, None, row.problem)
    try:
        return _Read(row, name, to_conversation(renamed(row.value, source.columns)), "")
    except MalformedRowError as error:
        return _Read(row, name, None, str(error))


def _line(row: Row) -> bytes:
    if row.raw is not None:
        return row.raw
    try:
        return json.dumps(row.value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, in a field that is not read
        return json.dumps(row.value).encode("ascii")


def _kept_names(paths: Sequence[Path]) -> list[Path]:
    """Where each file's kept rows go: as the files lie to each other, with the ending .jsonl.

    Raises InputError for a file that is named twice.
    """
    whole = [path.resolve() for path in paths]
    for place, path in enumerate(whole):
        if path in whole[:place]:
            raise InputError(f"{paths[place]}: is named twice; its rows would all be duplicates")
    top = Path(os.path.commonpath([path.parent for path in whole]))
    names: list[Path] = []
    for path in whole:
        stem = path.name
        for suffix in _SUFFIXES:
            stem = stem.removesuffix(suffix)
        within = path.relative_to(top)
        wanted = chain((stem or path.name, path.name), (f"{path.name}.{number}" for number in count(2)))
        names.append(next(name for one in wanted if (name := within.with_name(f"{one}.jsonl")) not in names))
    return names


_Batches = Iterable[tuple[list[_Read], list[Examined]]]


@contextmanager
def _examiners(cleaner: Cleaner, processes: int) -> Iterator[Callable[[Iterable[list[_Read]]], _Batches]]:
    """Something that gives every batch with what its rows show by themselves, in order."""
    if processes == 1:
        yield lambda batches: ((batch, _examine(cleaner, [read.conversation for read in batch])) for batch in batches)
        return
    # Forked: they share the benchmarks' index with this process instead of being sent it.
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (cleaner,)) as pool:
        pool.submit(int).result()  # starts them all, before the progress bar has a thread

        def examine(batches: Iterable[list[_Read]]) -> _Batches:
            waiting: deque[tuple[list[_Read], Future[list[Examined]]]] = deque()
            for batch in batches:
                waiting.append((batch, pool.submit(_examine_here, [read.conversation for read in batch])))
                if len(waiting) > 2 * processes:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for rest, result in waiting:
                yield rest, result.result()

        try:
            yield examine
        except BrokenProcessPool:
            raise InputError(
                f"clean: one of {processes} processes that examine rows was ended from outside, perhaps for want of "
                "memory; nothing is left of this run, --processes takes fewer"
            ) from None


_here: list[Cleaner] = []  # in a process that examines: its own


def _begin(cleaner: Cleaner) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here[:] = [cleaner]


def _end_with_parent() -> None:
    """One that was killed ends nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _examine_here(batch: Sequence[Conversation | None]) -> list[Examined]:
    return _examine(_here[0], batch)


def _examine(cleaner: Cleaner, batch: Sequence[Conversation | None]) -> list[Examined]:
    return [Examined(None) if conversation is None else cleaner.examine(conversation) for conversation in batch]
