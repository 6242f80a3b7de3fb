"""The answers of an evaluation on disk, one line each, as they come: an interrupted one goes on behind the last."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.benchmark import Sample
from ultrafuser_mega.files import write_atomically

SAMPLES = "samples.jsonl"
Key = tuple[str, str, str]  # model, benchmark, item


def key_of(sample: Sample) -> Key:
    """What there is one sample of."""
    return sample.model, sample.benchmark, sample.item


def rank_file(out: Path, rank: int, ranks: int) -> Path:
    """Where a rank appends: several processes do not share a file."""
    return out / (SAMPLES if ranks == 1 else f"samples.{rank}.jsonl")


def read_samples(path: Path) -> list[Sample]:
    """What a file holds; a last line that was cut off is left out.

    Raises:
        InputError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    samples = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            samples.append(_sample(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if number == len(lines):  # no line break behind it
                break
            raise InputError(f"{path}:{number}: damaged ({error}); remove the line to have it answered again") from None
    return samples


def gather_samples(out: Path) -> list[Sample]:
    """Put what ranks have left behind into one file, in the order that it has, and return all of it."""
    whole = out / SAMPLES
    parts = sorted(out.glob("samples.*.jsonl"))
    found = {key_of(sample): sample for path in (whole, *parts) if path.is_file() for sample in read_samples(path)}
    if parts or whole.is_file():
        write_atomically(whole, "".join(map(_line, found.values())))
    for path in parts:
        path.unlink()
    return list(found.values())


def append_sample(file: IO[str], sample: Sample) -> None:
    """One line, at once on its way to the disk."""
    file.write(_line(sample))
    file.flush()


def _line(sample: Sample) -> str:
    return json.dumps(asdict(sample)) + "\n"


def _sample(row: dict[str, Any]) -> Sample:
    known = {field.name for field in fields(Sample)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name in known
    }
    return Sample(**values)
