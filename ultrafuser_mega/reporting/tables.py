"""The two result tables of a run, for the terminal and for Markdown.

Losses: one row per model (fused, fused after stage 1 where known, every specialist on its own) and per
yardstick, one column per class and the mean. Gate: the paper's table 6, one row per specialist (w_text, ...), one
column per class. The best value of every column is bold: a model's lowest loss, the largest weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ultrafuser_mega.reporting.records import FUSED, MEAN, EvalRecord

_MISSING = "-"
_WIDEST = 10_000  # columns of a table that goes to a file


@dataclass(frozen=True)
class ResultTable:
    """Numbers with row and column names. ``best[i][j]`` marks the values to print bold; nan is a gap."""

    title: str
    corner: str
    columns: list[str]
    rows: list[str]
    values: list[list[float]]  # (rows, columns)
    best: list[list[bool]]  # (rows, columns)
    digits: int

    def cell(self, row: int, column: int) -> str:
        value = self.values[row][column]
        return _MISSING if math.isnan(value) else f"{value:.{self.digits}f}"


def loss_table(final: EvalRecord, *, after_stage1: EvalRecord | None = None, trained: str = FUSED) -> ResultTable:
    """Held-out loss in nats: fused, fused after stage 1, every specialist, yardsticks; per class and the mean.

    ``trained`` is what people read for "fused": the model that the run trains.
    """
    rows: dict[str, Mapping[str, float]] = {}
    for model in final.models:
        rows[trained if model == FUSED else model] = _column(final, model)
        if model == FUSED and after_stage1 is not None:
            rows[f"{FUSED} after stage 1"] = _column(after_stage1, FUSED)
    models = len(rows)
    for name, mean in final.yardstick_means.items():
        rows[name] = {of_class: losses[name] for of_class, losses in final.yardsticks.items()} | {MEAN: mean}
    columns = [*final.classes, MEAN]
    values = [[losses.get(column, math.nan) for column in columns] for losses in rows.values()]
    best = _best(values[:models], min) + [[False] * len(columns)] * (len(rows) - models)
    return ResultTable("Held-out loss (nats per token)", "model", columns, list(rows), values, best, 3)


def gate_table(final: EvalRecord) -> ResultTable:
    """Average gate weight per token: over all response tokens of a class (the paper's table 6)."""
    values = [[final.gate[name].get(model, math.nan) for name in final.gate] for model in final.specialists]
    columns = [f"{name} data" for name in final.gate]
    rows = [f"w_{name}" for name in final.specialists]
    return ResultTable("Average gate weight per token", "weight", columns, rows, values, _best(values, max), 2)


def to_rich(table: ResultTable) -> Table:
    view = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    view.add_column(Text(table.corner), no_wrap=True)
    for column in table.columns:
        view.add_column(Text(column), justify="right", no_wrap=True)
    for i, row in enumerate(table.rows):
        cells = [
            Text(table.cell(i, j), style="bold green" if table.best[i][j] else "") for j in range(len(table.columns))
        ]
        view.add_row(Text(row), *cells)
    return view


def to_markdown(table: ResultTable) -> str:
    """A GitHub table, padded so that it also reads well as plain text; no title."""
    header = [_escape(name) for name in (table.corner, *table.columns)]
    body = []
    for i, row in enumerate(table.rows):
        cells = [f"**{table.cell(i, j)}**" if table.best[i][j] else table.cell(i, j) for j in range(len(table.columns))]
        body.append([_escape(row), *cells])
    widths = [max(len(line[k]) for line in (header, *body)) for k in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(_markdown_row(line, widths) for line in (header, rule, *body)) + "\n"


def print_tables(tables: Sequence[ResultTable], file: TextIO | None = None) -> None:
    """Print to ``file`` (standard output unless told); where that is no terminal, as wide as a table needs to be."""
    console = Console(file=file)
    for table in tables:
        view = to_rich(table)
        if not console.is_terminal:
            console.width = Measurement.get(console, console.options.update(max_width=_WIDEST), view).maximum
        console.print(view)


def _column(record: EvalRecord, model: str) -> dict[str, float]:
    losses = {name: models[model] for name, models in record.loss.items() if model in models}
    return losses | ({MEAN: record.mean[model]} if model in record.mean else {})


def _best(values: list[list[float]], choose: Callable[[list[float]], float]) -> list[list[bool]]:
    """True where a value is the best of its column; nan never is."""
    winners = []
    for column in zip(*values, strict=True):
        finite = [value for value in column if math.isfinite(value)]
        winners.append(choose(finite) if finite else None)
    return [[value == winner for value, winner in zip(row, winners, strict=True)] for row in values]


def _markdown_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join([first, *rest]) + " |"


def _escape(name: str) -> str:
    return name.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
