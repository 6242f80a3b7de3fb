"""Instruction data for the three toy classes: generated from grammars, split, written as JSON lines.

Rows are ``{"instruction": ..., "output": ...}``. No instruction occurs twice within a class, so no
held-out row is in the training file. Same seed and counts: the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.toy import code_tasks, crossing_tasks, math_tasks, text_tasks

CLASSES = ("text", "code", "math")
BASE = "base"  # the model that a branched trio's three were trained on from
_TASKS = {
    "text": text_tasks.TASKS + crossing_tasks.TASKS["text"],
    "code": code_tasks.TASKS + crossing_tasks.TASKS["code"],
    "math": math_tasks.TASKS + crossing_tasks.TASKS["math"],
}
_TRIES_PER_ROW = 50


@dataclass(frozen=True)
class Row:
    """One instruction and the response that a specialist of its class gives."""

    instruction: str
    output: str


@dataclass(frozen=True)
class Split:
    """The rows of one class; the two parts share no instruction."""

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]


def generate(name: str, *, seed: int, train_rows: int, heldout_rows: int) -> Split:
    """Rows of class ``name`` ("text", "code" or "math"); a pure function of its arguments.

    Raises:
        InputError: the grammar of this class cannot give that many different instructions.
    """
    rng = Random(f"{name}-{seed}")
    wanted = train_rows + heldout_rows
    rows: dict[str, Row] = {}
    for _ in range(_TRIES_PER_ROW * wanted):
        if len(rows) == wanted:
            break
        instruction, output = rng.choice(_TASKS[name])(rng)
        rows.setdefault(instruction, Row(instruction, output))
    if len(rows) < wanted:
        raise InputError(
            f"train_rows + heldout_rows = {wanted}: the {name} grammar gave only {len(rows)} different instructions; "
            f"ask for at most {len(rows)}"
        )
    shuffled = list(rows.values())
    rng.shuffle(shuffled)  # common instructions come early, so a split in order of arrival would be skewed
    return Split(train=tuple(shuffled[heldout_rows:]), heldout=tuple(shuffled[:heldout_rows]))


def write_jsonl(path: Path, rows: tuple[Row, ...]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"instruction": row.instruction, "output": row.output}, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> tuple[Row, ...]:
    """Read what :func:`write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return tuple(Row(**json.loads(line)) for line in file)
