"""What the runs measured, read from their files: row -> one number per seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from reproduction.rows import AFTER_STAGE_1, ULTRAFUSER
from ultrafuser_mega.reporting.records import FUSED, MEAN, read_metrics

if TYPE_CHECKING:  # which bring torch, and numbers need none
    from reproduction.experiments import Experiment
    from reproduction.trios import Trio

#: row -> column -> a value per seed; the column "mean" among them
Table = dict[str, dict[str, list[float]]]


@dataclass
class Measured:
    """Everything that tables, claims and plots are made of.

    Attributes:
        seeds: repetitions, in the order of all lists.
        classes: of the data.
        specialists: their names; one that bears a class's name is that class's own.
        losses: held-out nats per response token by class; "mean" is over classes.
        accuracies: share of right replies by class, of rows that were asked.
        gate_per_token: specialist -> class -> weights.
        gate_per_sample: the same, averaged within each sample first.
        checkpoints: row -> per seed the fused model's mean losses over stage 2's evaluations.
        curves: row -> per seed (samples taken, training loss) by step.
        left_out: row -> why it is not here.
    """

    seeds: list[int]
    classes: list[str]
    specialists: list[str]
    losses: Table = field(default_factory=dict)
    accuracies: Table = field(default_factory=dict)
    gate_per_token: Table = field(default_factory=dict)
    gate_per_sample: Table = field(default_factory=dict)
    checkpoints: dict[str, list[list[float]]] = field(default_factory=dict)
    curves: dict[str, list[list[tuple[int, float]]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def own(self) -> list[str]:
        """Specialists that have a class."""
        return [name for name in self.specialists if name in self.classes]

    def complete(self) -> None:
        """Drop rows that a seed lacks: a mean over other seeds is no comparison."""
        for table in (self.losses, self.accuracies, self.gate_per_token, self.gate_per_sample):
            for row in [row for row, own in table.items() if any(len(v) < len(self.seeds) for v in own.values())]:
                del table[row]
                self.left_out.setdefault(row, "not of every seed")


def read_seed(measured: Measured, trio: Trio, runs: Sequence[Experiment]) -> None:
    """Add one seed's results."""
    for one in runs:
        if not one.is_done:
            continue
        summary = json.loads(one.result.read_text())
        if one.row == ULTRAFUSER:
            _read_fused(measured, summary)
        _add(measured.losses, one.row, _losses_of(summary["eval"], FUSED))
        if one.run_dir is not None and (one.run_dir / "metrics.jsonl").is_file():
            _read_metrics(measured, trio, one.row, one.run_dir)


def read_accuracies(measured: Measured, results: Path) -> None:
    """Add one seed's results.json of ultrafuser evaluate on the toy's suite."""
    for row, own in json.loads(results.read_text())["models"].items():
        found = {name.removeprefix("toy_"): cell["mean"] for name, cell in own["scores"].items()}
        _add(measured.accuracies, row, found | {MEAN: fmean(found.values())})


def deviations(measured: Measured, row: str) -> tuple[list[float], list[float]]:
    """Of the last half of stage 2's evaluations, per seed: mean and standard deviation (the paper's table 4)."""
    halves = [losses[len(losses) // 2 :] for losses in measured.checkpoints[row]]
    return [fmean(half) for half in halves], [stdev(half) if len(half) > 1 else 0.0 for half in halves]


def recovered(table: Table, single: str, row: str, top: str) -> list[float]:
    """Per seed: the share of the way from ``single`` to ``top`` that ``row`` is, in means."""
    means = (table[name][MEAN] for name in (single, row, top))
    return [(begin - own) / (begin - end) for begin, own, end in zip(*means, strict=True)]


def _read_fused(measured: Measured, summary: Mapping[str, Any]) -> None:
    for name in measured.specialists:
        if name in summary["eval"][MEAN]:
            _add(measured.losses, name, _losses_of(summary["eval"], name))
    for yardstick in summary.get("yardsticks", {}).get(MEAN, {}):
        _add(measured.losses, yardstick, _losses_of(summary["yardsticks"], yardstick))
    if "after_stage1" in summary:
        _add(measured.losses, AFTER_STAGE_1, _losses_of(summary["after_stage1"]["eval"], FUSED))
    for table, key in ((measured.gate_per_token, "gate_per_token"), (measured.gate_per_sample, "gate_per_sample")):
        for name in measured.specialists:
            _add(table, name, {of_class: weights[name] for of_class, weights in summary[key].items()})


def _read_metrics(measured: Measured, trio: Trio, row: str, run_dir: Path) -> None:
    steps, evals = read_metrics(run_dir)
    found = [record.mean[FUSED] for record in evals if record.stage == 2 and FUSED in record.mean]
    measured.checkpoints.setdefault(row, []).append(found)
    taken, curve = 0, []
    for record in steps:
        stage = trio.config.stage1 if record.stage == 1 else trio.config.stage2
        taken += stage.samples_per_class * len(trio.config.data.classes)
        curve.append((taken, record.loss))
    measured.curves.setdefault(row, []).append(curve)


def _losses_of(evaluation: Mapping[str, Mapping[str, float]], model: str) -> dict[str, float]:
    found = {name: losses[model] for name, losses in evaluation.items() if name != MEAN and model in losses}
    return found | {MEAN: fmean(found.values())}


def _add(table: Table, row: str, values: Mapping[str, float]) -> None:
    own = table.setdefault(row, {})
    for column, value in values.items():
        own.setdefault(column, []).append(value)
