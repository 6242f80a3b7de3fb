"""A table of layouts, best first: the time that a step is predicted to take, and what a rank holds and does in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from ultrafuser_mega.reporting.plan_table import SHORT

_GIB, _GB, _TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class LayoutRow:
    """What is predicted of a layout. ``note``: None where it fits as configured, else what it lacks and needs."""

    layout: str
    seconds: float
    mfu: float
    idle: float
    parts: Mapping[str, float]  # what the slowest rank does -> seconds of the step
    peak: float  # bytes of the rank that holds most
    phase: str  # when that is
    kinds: Mapping[str, float]  # kind of memory -> bytes of that rank
    flops: float  # of the slowest rank's products in a step
    nbytes: Mapping[str, float]  # group -> bytes of that rank's collectives in a step
    note: str | None


def layout_table(title: str, rows: Sequence[LayoutRow], more: int) -> Table:
    """Two lines a layout, a third where it does not fit; ``more``: layouts that are not shown."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layout, what takes longest", min_width=31)
    for column in ("s/step, MFU", "idle", "peak GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("GiB of that rank", no_wrap=True)
    table.add_column("a rank's TFLOP, GB", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(f"{row.layout}\n{longest(row.parts)}" + (f"\n{row.note}" if row.note else "")),
            f"{row.seconds:.2f}\n{row.mfu:.1%}",
            f"{row.idle:.0%}",
            f"{row.peak / _GIB:.1f}\n{row.phase}",
            _kinds(row.kinds),
            f"{row.flops / _TERA:,.0f}\n{_groups(row.nbytes)}",
            style="" if row.note is None else "dim",
        )
    if more:
        table.caption = f"{more} more layouts are slower or do not fit"
    return table


def longest(parts: Mapping[str, float], count: int = 2) -> str:
    """What takes longest, in words: ``products 48%, tp traffic 22%``."""
    total = sum(parts.values())
    first = sorted(parts.items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in first if seconds >= 0.05 * total)


def _kinds(kinds: Mapping[str, float]) -> str:
    words = [f"{SHORT.get(kind, kind)} {count / _GIB:.1f}" for kind, count in kinds.items()]
    return " ".join(words[:2]) + "\n" + " ".join(words[2:])


def _groups(nbytes: Mapping[str, float]) -> str:
    return " ".join(f"{group} {_number(count / _GB)}" for group, count in nbytes.items() if count >= 0.05 * _GB)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
