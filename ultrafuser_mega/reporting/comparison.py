"""Runs beside each other, from what their folders hold: results, speed, phases, and where their settings differ.

Nothing here needs a run to be finished: metrics.jsonl grows with every step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.plan_table import size
from ultrafuser_mega.reporting.records import (
    FUSED,
    MEAN,
    METRICS_FILE,
    SUMMARY_FILE,
    YARDSTICKS,
    EvalRecord,
    StepRecord,
    read_metrics,
)

CONFIG_FILE = "config.yaml"
_GAP = "-"
_LAST = 10  # steps whose training loss is averaged


@dataclass(frozen=True)
class RunData:
    """A run's folder, read. ``name`` tells it from the others; ``summary`` is {} before the run's end."""

    path: Path
    name: str
    steps: list[StepRecord]
    evals: list[EvalRecord]
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def last_stage(self) -> list[StepRecord]:
        """Steps of the last stage that has any, but for its first, which other things come before."""
        stage = self.steps[-1].stage
        return [step for step in self.steps if step.stage == stage][1:] or self.steps[-1:]


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs of these folders.

    Raises:
        InputError: one is no run's folder, or has done no step yet; names it.
    """
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> RunData:
    steps, evals = read_metrics(folder)
    if not steps:
        raise InputError(f"{folder / METRICS_FILE}: holds no step yet; give the folder of a run that has trained")
    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text()) if (folder / CONFIG_FILE).is_file() else {}
        summary = json.loads((folder / SUMMARY_FILE).read_text()) if (folder / SUMMARY_FILE).is_file() else {}
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{folder}: {CONFIG_FILE} or {SUMMARY_FILE} is damaged: {why}") from None
    return RunData(folder, name, steps, evals, config or {}, summary)


def comparison_tables(runs: Sequence[RunData]) -> list[Table]:
    """Results, speed and phases of every run; and, of more than one, what their configurations differ in.

    Speed is the median, phases are the mean over the steps of the last stage that has any.
    """
    tables = [_results(runs), _speed(runs), _phases(runs)]
    return [*tables, _differences(runs)] if len(runs) > 1 else tables


def _results(runs: Sequence[RunData]) -> Table:
    table = _table("Results (nats per token)", runs)
    _row(table, "steps", runs, lambda run: str(run.steps[-1].step))
    _row(table, f"training loss, last {_LAST} steps", runs, lambda run: _number(fmean(_losses(run)), ".4f"))
    for name in dict.fromkeys([*(name for run in runs for name in _held_out(run)), MEAN]):
        _row(table, f"held out, {name}", runs, partial(_held_out_cell, name=name))
    for name in YARDSTICKS:
        _row(table, f"{name}, mean", runs, partial(_yardstick, name=name))
    return table


def _losses(run: RunData) -> list[float]:
    return [step.loss for step in run.steps[-_LAST:]]


def _held_out(run: RunData) -> dict[str, float]:
    """Class, and the mean -> the fused model's last held-out loss."""
    if not run.evals:
        return {}
    last = run.evals[-1]
    found = {name: losses[FUSED] for name, losses in last.loss.items() if FUSED in losses}
    return found | ({MEAN: last.mean[FUSED]} if FUSED in last.mean else {})


def _yardstick(run: RunData, name: str) -> str:
    """Of the specialists as they came, mean over the classes."""
    before = next((record for record in reversed(run.evals) if record.stage == 1), None)
    return _number(before.yardstick_means.get(name) if before else None, ".4f")


def _held_out_cell(run: RunData, name: str) -> str:
    return _number(_held_out(run).get(name), ".4f")


def _speed(runs: Sequence[RunData]) -> Table:
    table = _table("Speed (medians)", runs)
    _row(table, "layout", runs, lambda run: str(run.summary.get("layout", _GAP)))
    _row(table, "device", runs, lambda run: str(run.summary.get("device", _GAP)))
    _row(table, "seconds per step", runs, lambda run: _middle(run, "seconds", ".3g"))
    _row(table, "response tokens/s", runs, lambda run: _middle(run, "tokens_per_s", ",.0f"))
    _row(table, "model FLOPs utilisation", runs, lambda run: _middle(run, "mfu", ".1%"))
    _row(table, "padding", runs, lambda run: _middle(run, "padding", ".1%"))
    _row(table, "memory at the end", runs, lambda run: _bytes(run.steps[-1].memory_bytes))
    _row(table, "memory at the most", runs, lambda run: _bytes(run.steps[-1].peak_memory_bytes))
    _row(table, "skipped steps", runs, lambda run: str(sum(step.skipped for step in run.steps) or _GAP))
    _row(table, "seconds in saves", runs, lambda run: _number(_saves(run), ".3g"))
    return table


def _middle(run: RunData, field: str, form: str) -> str:
    values = [value for step in run.last_stage if not math.isnan(value := getattr(step, field))]
    return _number(median(values), form) if values else _GAP


def _saves(run: RunData) -> float:
    """Every process counts from 0, and a resumed run is several."""
    counted = [step.save_seconds for step in run.steps if not math.isnan(step.save_seconds)]
    return sum(after - before if after >= before else after for before, after in pairwise([0.0, *counted]))


def _phases(runs: Sequence[RunData]) -> Table:
    table = _table("Phases (s, mean / worst rank)", runs)
    for name in dict.fromkeys(name for run in runs for step in run.last_stage for name in step.phases):
        _row(table, name, runs, partial(_phase, name=name))
    return table


def _phase(run: RunData, name: str) -> str:
    measured = [step.phases for step in run.last_stage if step.phases]
    if not any(name in phases for phases in measured):
        return _GAP
    mean, worst = (fmean(phases.get(name, {}).get(of, 0.0) for phases in measured) for of in ("mean", "worst"))
    return f"{mean:.3g} / {worst:.3g}"


def _differences(runs: Sequence[RunData]) -> Table:
    table = _table("Configurations: what differs", runs, "key")
    settings = [dict(_flat(run.config)) for run in runs]
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [json.dumps(one[key], ensure_ascii=False) if key in one else _GAP for one in settings]
        if len(set(values)) > 1 and not set(values) <= {_GAP, "null"}:  # nowhere set, though some have the section
            table.add_row(Text(key), *map(Text, values))
    return table


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) with keys as overrides have them; of lists as well."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, dict | list) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(title: str, runs: Sequence[RunData], corner: str = "") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(corner, no_wrap=True)
    for run in runs:
        table.add_column(Text(run.name), justify="right")
    return table


def _row(table: Table, name: str, runs: Sequence[RunData], cell: Callable[[RunData], str]) -> None:
    """A row of every run's value; none where no run has one."""
    cells = [cell(run) for run in runs]
    if set(cells) != {_GAP}:
        table.add_row(Text(name), *map(Text, cells))


def _number(value: float | None, form: str) -> str:
    return _GAP if value is None or math.isnan(value) else format(value, form)


def _bytes(count: float) -> str:
    return _GAP if math.isnan(count) else size(count)
