"""Benchmarks' items as their files have them, without the words in which a model is asked: what may have copies.

Of every benchmark of the paper's tables, by the readers that also ask a model (benchmarks/); of any other file whose
rows ``ultrafuser prepare`` could read, with or without answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ultrafuser_mega.cleaning.contamination import BenchmarkText
from ultrafuser_mega.data.conversation import MalformedRowError, to_conversation, to_prompt
from ultrafuser_mega.data.readers import read_rows
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Benchmark
from ultrafuser_mega.evaluation.benchmarks import SUITES, benchmark
from ultrafuser_mega.evaluation.benchmarks.files import JsonlBenchmark, at_line, jsonl_rows
from ultrafuser_mega.evaluation.benchmarks.humaneval import split_prompt
from ultrafuser_mega.evaluation.benchmarks.truthfulqa import TruthfulQa, rows

_OTHERS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
Texts = Iterable[tuple[str, str]]  # question, answer


def published_items(places: Iterable[Path]) -> list[BenchmarkText]:
    """The items of benchmark files.

    Args:
        places: files as published, told by their names, or of other benchmarks, which are called as the file is; of a
            folder, all in it that are either.

    Raises:
        InputError: there is none, or one is not what it should be, with file and line.
    """
    known = {one.source: one for one in map(benchmark, SUITES["paper"].benchmarks)}
    items: list[BenchmarkText] = []
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such file or folder; expected benchmark files, or a folder with some")
        files = [place]
        if place.is_dir():
            there = sorted(path for path in place.iterdir() if path.is_file())
            files = [path for path in there if path.name in known or path.name.endswith(_OTHERS)]
            if not files:
                raise InputError(f"{place}: no benchmark file in it; expected {', '.join(known)}, or other JSONL")
        for path in files:
            items += _known(known[path.name], path) if path.name in known else _other(path)
    return items


def _known(one: Benchmark, path: Path) -> Iterator[BenchmarkText]:
    if isinstance(one, TruthfulQa):
        for _, number, row in rows(path):
            yield BenchmarkText(one.name, f"{one.name}/{number}", row["Question"])
        return
    assert isinstance(one, JsonlBenchmark)
    for line, row in jsonl_rows(path, one.fields):
        texts = list(at_line(path, line, _TEXTS[one.name], row))
        for turn, (question, answer) in enumerate(texts, start=1):
            name = f"{one.name}/{line}" if len(texts) == 1 else f"{one.name}/{line}.{turn}"
            yield BenchmarkText(one.name, name, question, answer)


def _of_agieval(row: Mapping[str, Any]) -> Texts:
    other = row.get("other")
    solution = other.get("solution") if isinstance(other, dict) else None
    yield f"{row.get('passage') or ''} {row['question']}", solution if isinstance(solution, str) else ""


def _of_humaneval(row: Mapping[str, Any]) -> Texts:
    """What the function is to do, without its name and examples, which a copy need not have."""
    docstring = split_prompt(row["prompt"], row["entry_point"]).docstring
    solution = row.get("canonical_solution")
    description = re.split(r">>>|\b[Ee]xamples?\b|\b[Ff]or example\b", docstring, maxsplit=1)[0]
    yield description if len(description.split()) >= len(docstring.split()) / 4 else docstring, str(solution or "")


_TEXTS: Mapping[str, Callable[[Mapping[str, Any]], Texts]] = MappingProxyType(
    {
        "alpacaeval": lambda row: [(row["instruction"], str(row.get("output") or ""))],
        "humaneval": _of_humaneval,
        "gsm8k": lambda row: [(row["question"], row["answer"])],
        "math": _of_agieval,
        "sat_math": _of_agieval,
        "aqua": _of_agieval,
        "mt_bench": lambda row: [(str(turn), "") for turn in row["turns"]],
    }
)


def _other(path: Path) -> Iterator[BenchmarkText]:
    name = path.name.split(".")[0]
    for row in read_rows(path):
        if row.problem is not None:
            raise InputError(f"{path}:{row.line}: {row.problem}")
        try:
            prompt = to_prompt(row.value)
        except MalformedRowError as error:
            raise InputError(f"{path}:{row.line}: {error}") from None
        question = "\n".join(message["content"] for message in prompt if message["role"] == "user")
        yield BenchmarkText(name, f"{name}/{row.number}", question, _answer(row.value))


def _answer(row: Any) -> str:
    try:
        return to_conversation(row).turns[-1][1]
    except MalformedRowError:  # a question alone
        return ""
