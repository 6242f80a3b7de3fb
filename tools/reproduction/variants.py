"""Runs that are compared with each other for what one node can do: what stage 2 trains, and one model out.

Both begin with a fused run: its checkpoint behind stage 1, its model as teacher. Commands of ultrafuser, as in
``experiments``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reproduction.experiments import Experiment
from reproduction.rows import AVERAGE, TASK_ARITHMETIC, ULTRAFUSER
from reproduction.trios import FUSED_RUN, Trio
from ultrafuser_mega.baselines.derived import steps_of_both_stages
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import GATE
from ultrafuser_mega.errors import InputError

#: What stage 2 trains -> its settings; the gate at its own rate in all of them.
TRAINED: dict[str, tuple[str, ...]] = {
    "everything": ("stage2.train={}",),
    "adapters of rank 32": ("stage2.train={heads: frozen, specialists: lora}", "lora={rank: 32, alpha: 64}"),
    "adapters of rank 8": ("stage2.train={heads: frozen, specialists: lora}", "lora={rank: 8, alpha: 16}"),
    "gate and heads": ("stage2.train={specialists: frozen}",),
}
_AT_THE_END = "evaluation.every=0"  # and at the beginning: what a table needs
_FRESH = "distil.refresh=10"  # these runs are short, and their student soon answers otherwise
LABELS = "labels alone"
OWN_FIRST = "own then on-policy"  # an equal half of the steps each
#: What a student learns on -> its settings; labels alone are further tuning.
LESSONS: dict[str, tuple[str, ...]] = {
    LABELS: (),
    "forward KL": (),
    "reverse KL": ("distil.reverse=1",),
    "half labels": ("distil.labels=0.5",),
    "teacher's answers": ("distil.data={own: 0, prompts: 1}",),
    "on-policy": ("distil.data={own: 0, on_policy: 1}", _FRESH),
    OWN_FIRST: ("distil.data={own: 1, on_policy: 1}", _FRESH),
    "mixture": ("distil.data={own: 2, prompts: 1, on_policy: 1}", _FRESH),
}


@dataclass(frozen=True)
class Row:
    """One kind at one rate.

    Attributes:
        kind: a key of TRAINED or LESSONS.
        lr: stage2.lr; None: the configuration's.
    """

    kind: str
    lr: float | None

    def __str__(self) -> str:
        return self.kind if self.lr is None else f"{self.kind}, {self.lr:g}"

    @property
    def key(self) -> str:
        """Of files."""
        return "-".join(re.findall(r"[A-Za-z0-9.]+", str(self)))

    @property
    def rate(self) -> tuple[str, ...]:
        """As a setting."""
        return () if self.lr is None else (f"stage2.lr={self.lr:g}",)


@dataclass(frozen=True)
class Compared:
    """What is to be compared.

    Attributes:
        rows: of the table.
        into: the specialist that a student begins as.
        fused: a finished run that all seeds begin with; None: each seed trains its own.
        steps: of a student; None: as many samples as the fused run takes.
    """

    rows: Sequence[Row]
    into: str = "text"
    fused: Path | None = None
    steps: int | None = None

    @property
    def suffix(self) -> str:
        """Of files of students, which are others after other steps."""
        return "" if self.steps is None else f"-{self.steps}-steps"


def parse_rows(text: str, known: Iterable[str]) -> list[Row]:
    """KIND or KIND@RATE, with commas; nothing: all kinds at the configuration's rate. Raises InputError."""
    kinds = list(known)
    found = []
    for part in [part.strip() for part in text.split(",") if part.strip()] or kinds:
        kind, at, rate = part.partition("@")
        if kind not in kinds:
            raise InputError(f"--rows {part}: there is no such kind; use {', '.join(kinds)}")
        try:
            lr = float(rate) if at else None
        except ValueError:
            lr = 0.0
        if lr is not None and not 0.0 < lr < math.inf:
            raise InputError(f"--rows {part}: expected a rate behind @, as in {kind}@5e-4")
        if (row := Row(kind, lr)) in found:
            raise InputError(f"--rows {part}: stands twice; give it once")
        found.append(row)
    return found


def fused_run(trio: Trio, compared: Compared) -> Experiment:
    """What a seed's runs begin with."""
    run_dir = compared.fused or trio.config.runs / FUSED_RUN
    command = ("train", "--config", str(trio.config_path), f"name={FUSED_RUN}")
    return Experiment(
        ULTRAFUSER, FUSED_RUN, command, run_dir / "summary.json", run_dir, str(run_dir), go_on="--requeue"
    )


def adapters(trio: Trio, compared: Compared) -> list[Experiment]:
    """Stage 2 in every kind, from one checkpoint of stage 1.

    Raises:
        InputError: the fused run keeps none.
    """
    folder = (compared.fused or trio.config.runs / FUSED_RUN) / "checkpoints"
    untrained = [path for progress, path in list_checkpoints(folder) if progress.stage == 1]
    if not untrained:
        raise InputError(f"{folder}: holds no checkpoint of stage 1; train one with stage1.steps above 0")
    gate = trio.config.parts(2)[GATE].rates.lr
    found = []
    for row in compared.rows:
        begins = (f"name={row.key}", "stage1.steps=0", f"checkpoint.start={untrained[-1]}", _AT_THE_END)
        settings = (*TRAINED[row.kind], *row.rate, f"stage2.gate_lr={gate:g}")
        command = ("train", "--config", str(trio.config_path), *begins, *settings)
        run_dir = trio.config.runs / row.key
        found.append(Experiment(str(row), row.key, command, run_dir / "summary.json", run_dir, go_on="--requeue"))
    return found


def students(trio: Trio, compared: Compared) -> list[Experiment]:
    """What one model can be: merged, trained on labels, and distilled in every kind, for equally many steps."""
    into, found = compared.into, list[Experiment]()
    found.append(_exported(trio, AVERAGE, "average", ("baseline", "average"), None, ()))
    if trio.base is not None:
        command = ("baseline", "task-arithmetic", "--base", str(trio.base))
        found.append(_exported(trio, TASK_ARITHMETIC, "task-arithmetic", command, None, ()))
    teacher = compared.fused or trio.config.runs / FUSED_RUN
    for row in compared.rows:
        command = ("distil", str(teacher), "--into", into)
        if row.kind == LABELS:
            command = ("baseline", "further-tuned", "--specialist", into)
        store = "tuned-store" if row.kind == LABELS else "student-store"
        settings = (*LESSONS[row.kind], *row.rate)
        if compared.steps is not None:
            settings += ("stage1.steps=0", f"stage2.steps={compared.steps}")
        if row.kind == OWN_FIRST:
            settings += (f"distil.on_policy_after={(compared.steps or steps_of_both_stages(trio.config)) // 2}",)
        found.append(_exported(trio, str(row), row.key + compared.suffix, command, store, settings))
    return found


def _exported(
    trio: Trio, row: str, key: str, command: tuple[str, ...], store: str | None, settings: tuple[str, ...]
) -> Experiment:
    out = trio.root / "models" / key
    command += ("--config", str(trio.config_path), "--out", str(out), *settings)
    if store is not None:  # it trains
        command += (f"name={key}", f"data.store={trio.root / store}", _AT_THE_END)
    result, go_on = out / "summary.json", "--requeue" if store else ""
    return Experiment(row, key, command, result, address=str(out), go_on=go_on)
