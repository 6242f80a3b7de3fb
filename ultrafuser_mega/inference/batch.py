"""Prompts from a JSONL file, answers into one, gate weights into another; files get their names when complete."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ultrafuser_mega.checkpoint.unfinished import refuse_existing, unfinished_of
from ultrafuser_mega.data.conversation import MalformedRowError, to_prompt
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer, Limits
from ultrafuser_mega.inference.requests import Prompt
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.text_engine import Answer

ANSWER, FINISH = "generated", "finish_reason"


class PromptFile:
    """The rows of a JSON or JSONL file, each a prompt in one of the shapes that training data has (answers optional).

    Raises:
        InputError: a row that is no prompt, named by file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.messages: list[list[dict[str, str]]] = []
        self.lines: list[int] = []
        for row in read_rows(path):
            if row.problem is not None:
                raise InputError(f"{path}:{row.line}: {row.problem}")
            try:
                self.messages.append(to_prompt(row.value))
            except MalformedRowError as error:
                raise InputError(f"{path}:{row.line}: {error}") from None
            if taken := {ANSWER, FINISH} & set(row.value):
                raise InputError(f"{path}:{row.line}: has the field {min(taken)} already; rename it")
            self.rows.append(row.value)
            self.lines.append(row.line)
        if not self.rows:
            raise InputError(f"{path}: holds no rows")

    def encode(self, answerer: Answerer, system: str | None) -> list[Prompt]:
        """All prompts; ``system`` goes before conversations that bring no system text."""
        prompts = []
        for messages, line in zip(self.messages, self.lines, strict=True):
            opening = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
            try:
                prompts.append(answerer.encode([*opening, *messages]))
            except InputError as error:
                raise InputError(f"{self.path}:{line}: {error}") from None
        return prompts


def answer_file(
    answerer: Answerer,
    source: PromptFile,
    prompts: Sequence[Prompt],
    out: Path,
    trace: Path | None,
    limits: Limits,
    sampling: Sampling,
) -> None:
    """Write every row with its answer to ``out`` (fields ``generated`` and ``finish_reason``), in the order read."""
    columns = TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with (
        new_file(out) as answers,
        TraceFile(trace, answerer.names) as traces,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(prompts))
        done: dict[int, Answer] = {}
        written = 0
        for event in answerer.stream(prompts, limits, sampling):
            if not isinstance(event, tuple):
                continue
            done[event[0]] = event[1]
            progress.advance(task)
            while (answer := done.pop(written, None)) is not None:
                _append(answers, source.rows[written] | {ANSWER: answer.text, FINISH: answer.finish_reason})
                traces.write(written, answer)
                written += 1


class TraceFile:
    """Gate weights of every token of every answer, a JSON object per answer; nothing where there is no path."""

    def __init__(self, path: Path | None, names: Sequence[str]) -> None:
        self._names = list(names)
        self._context = None if path is None else new_file(path)
        self._file: IO[str] | None = None

    def __enter__(self) -> TraceFile:
        self._file = None if self._context is None else self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)

    def write(self, row: int, answer: Answer) -> None:
        """``row``: the row's number from 0."""
        if self._file is None:
            return
        tokens = [
            {"id": token.id, "text": token.text, "weights": [round(weight, 6) for weight in token.weights]}
            for token in answer.tokens
        ]
        record = {
            "row": row,
            "specialists": self._names,
            "mean_weights": [round(weight, 6) for weight in answer.mean_weights()],
            "tokens": tokens,
        }
        _append(self._file, record)


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair in a field of the input
        text = json.dumps(record)
    return text + "\n"


def _append(file: IO[str], record: Mapping[str, Any]) -> None:
    try:
        file.write(_line(record))
    except OSError as error:
        raise InputError(f"{file.name}: cannot be written: {error.strerror}") from None


@contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """Write to a hidden neighbour that gets the name ``path`` at a good end; never over a file that is there.

    Raises:
        InputError: there is a file of this name, another process writes one, or it cannot be written.
    """
    refuse_existing(path)
    partial = unfinished_of(path)
    try:
        file = partial.open("a", encoding="utf-8")  # not emptied yet: it may be another's
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: another process writes to this name; choose another one") from None
            refuse_existing(path)  # the other may have been through in the meantime
            file.truncate(0)
            yield file
            file.flush()
            partial.rename(path)
    except KeyboardInterrupt:
        print(f"interrupted; what was finished is in {partial}", file=sys.stderr)
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}; what was finished is in {partial}") from None
