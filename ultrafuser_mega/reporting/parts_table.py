"""A table of what a stage trains, part by part, and what that costs, for people."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ultrafuser_mega.reporting.plan_table import size


@dataclass(frozen=True, kw_only=True)
class PartShare:
    """A part in a stage: numbers of parameters, bytes of all ranks of a replica."""

    name: str
    mode: str  # frozen, lora or full
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    lr: float
    weight_decay: float


def parts_table(title: str, parts: Sequence[PartShare]) -> Table:
    """One row per part and one of all: parameters, those that train, bytes by kind, rate and decay."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("part", no_wrap=True)
    table.add_column("trains", no_wrap=True)
    for column in ("parameters", "trained", "weights", "gradients", "optimizer", "lr", "weight decay"):
        table.add_column(column, justify="right", no_wrap=True)
    for part in parts:
        trains = part.mode != "frozen"
        table.add_row(
            part.name,
            part.mode,
            f"{part.parameters:,}",
            f"{part.trained:,}" if trains else "-",
            size(part.weights),
            *(size(held) if trains else "-" for held in (part.gradients, part.optimizer)),
            *(f"{number:g}" if trains else "-" for number in (part.lr, part.weight_decay)),
        )
    table.add_section()
    whole = sum(part.parameters for part in parts)
    trained = sum(part.trained for part in parts)
    table.add_row(
        "all",
        f"{trained / whole:.2%}",
        f"{whole:,}",
        f"{trained:,}",
        *(size(sum(getattr(part, kind) for part in parts)) for kind in ("weights", "gradients", "optimizer")),
    )
    return table


def as_text(table: Table) -> str:
    """The table in lines, as wide as it is."""
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
