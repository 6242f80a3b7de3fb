"""A table of what every rank of a planned run holds, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank holds; places are (index, number), counted from 0."""

    rank: int
    specialists: tuple[str, ...]
    tensor: tuple[int, int]
    stage: tuple[int, int]
    vocabulary_rows: range | None  # of every head; empty where all are padding, None outside of the fusion group
    parameters: int
    stage_bytes: Mapping[int, float]  # stage that has steps -> weights, gradients and optimizer state


def plan_table(title: str, shares: Sequence[RankShare]) -> Table:
    """One row per rank: role, vocabulary rows, parameters and bytes of weights and optimizer."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "specialist", "tp", "stage", "vocabulary rows"):
        table.add_column(column, no_wrap=True)
    stages = [f"stage {number}" for number in shares[0].stage_bytes]
    for column in ("parameters", *stages):
        table.add_column(column, justify="right", no_wrap=True)
    for share in shares:
        table.add_row(
            str(share.rank),
            ", ".join(share.specialists),
            _place(*share.tensor),
            _place(*share.stage),
            _rows(share.vocabulary_rows),
            f"{share.parameters:,}",
            *map(_size, share.stage_bytes.values()),
        )
    if stages:
        table.caption = f"{', '.join(stages)}: weights, gradients and optimizer state; activations come on top"
    return table


def _place(index: int, number: int) -> str:
    return f"{index + 1}/{number}"


def _rows(rows: range | None) -> str:
    if rows is None:
        return "-"
    return f"{rows.start}-{rows.stop - 1}" if rows else "padding"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
