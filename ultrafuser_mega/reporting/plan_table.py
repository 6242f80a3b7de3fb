"""A table of what every rank of a planned run holds, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

#: Kinds of memory -> their names where there is little room.
SHORT = {"gradients": "grads", "activations": "act", "optimizer": "opt"}


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """What one rank holds; places are (index, number), counted from 0."""

    rank: int
    specialists: tuple[str, ...]
    tensor: tuple[int, int]
    stage: tuple[int, int]
    vocabulary_rows: range | None  # of every head; empty where all are padding, None outside of the fusion group
    parameters: int
    kinds: Mapping[int, Mapping[str, float]]  # stage that has steps -> kind of memory -> bytes
    peaks: Mapping[int, tuple[str, float]]  # the same -> when most is held, and how much
    host: Mapping[int, float]  # the same -> bytes of the host's memory


def plan_table(title: str, shares: Sequence[RankShare]) -> Table:
    """One row per rank: role, vocabulary rows, parameters, memory by kind in the last stage, every stage's peak."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("rank", "specialist", "tp", "stage", "vocabulary rows"):
        table.add_column(column, no_wrap=True)
    stages = list(shares[0].kinds)
    kinds = list(shares[0].kinds[stages[-1]]) if stages else []
    on_host = ["host"] if any(share.host[stages[-1]] for share in shares if stages) else []
    columns = [*(SHORT.get(kind, kind) for kind in kinds), *on_host, *(f"stage {number}" for number in stages)]
    for column in ("parameters", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for share in shares:
        table.add_row(
            str(share.rank),
            ", ".join(share.specialists),
            _place(*share.tensor),
            _place(*share.stage),
            _rows(share.vocabulary_rows),
            f"{share.parameters:,}",
            *(size(share.kinds[stages[-1]][kind]) for kind in kinds),
            *(size(share.host[stages[-1]]) for _ in on_host),
            *(f"{size(held)} {phase}" for phase, held in share.peaks.values()),
        )
    if stages:
        names = ", ".join(f"stage {number}" for number in stages)
        table.caption = f"{names}: the most that is held, and when; {kinds[0]} to {kinds[-1]}: of stage {stages[-1]}"
    return table


def _place(index: int, number: int) -> str:
    return f"{index + 1}/{number}"


def _rows(rows: range | None) -> str:
    if rows is None:
        return "-"
    return f"{rows.start}-{rows.stop - 1}" if rows else "padding"


def size(count: float) -> str:
    """Bytes in the largest unit that they fill."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
