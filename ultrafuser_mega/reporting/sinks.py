"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, a file for Prometheus.

A number has one name everywhere: its path in its record of metrics.jsonl, as in ``loss``, ``gate/math/text`` or
``phases/exchange/worst``, behind ``eval/`` for an evaluation's. Prometheus puts the parts of a path behind the first in
labels. What was not measured (nan) goes nowhere.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ultrafuser_mega.errors import InputError, writing

TENSORBOARD_FOLDER = "tensorboard"
_WANDB_ID = "wandb-id.txt"  # in the run's folder: a resumed run goes on with its curves
#: First part of a path, behind "eval/" -> what the parts behind it are called.
_LABELS = {
    "class_loss": ("class",),
    "gate": ("class", "specialist"),
    "phases": ("phase", "of"),
    "loss": ("class", "model"),
    "yardsticks": ("class", "yardstick"),
}


class Sink(Protocol):
    """Takes a step's or an evaluation's numbers."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """``step`` counts from 1 through both stages."""

    def close(self) -> None:
        """Nothing follows."""


def scalars_of(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Name -> number, for every number of a record that was measured."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars_of(value, f"{prefix}{name}/")
        elif not math.isnan(value):
            found[prefix + name] = float(value)
    return found


class TensorBoard:
    """Event files in ``run_dir/tensorboard``; those of earlier files are hidden from ``purge_step`` on."""

    def __init__(self, run_dir: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, which who only reads records does without

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=purge_step, flush_secs=10)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of a Weights & Biases project; a resumed run is the same one.

    Raises:
        InputError: wandb refuses.
    """

    def __init__(self, project: str, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb  # which few need

        file = run_dir / _WANDB_ID
        if not file.is_file():
            file.write_text(uuid.uuid4().hex)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=name,
                id=file.read_text().strip(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            why = " ".join(str(error).split())
            raise InputError(f"report.wandb: {project}: {why}; wandb login, or WANDB_MODE=offline") from None
        # wandb's own count of steps cannot go back, as a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


class Prometheus:
    """The last numbers of a run in Prometheus' text format, in a file that is replaced whole.

    Args:
        path: whose folder node_exporter's textfile collector reads.
        name: of the run, a label of every number.
        warn: takes a line when the file cannot be written any more; the run goes on, and tries again.

    Raises:
        InputError: the file cannot be written at all.
    """

    def __init__(self, path: Path, name: str, warn: Callable[[str], None]) -> None:
        self._path, self._name, self._warn = path, name, warn
        self._now: dict[str, float] = {}
        self._failed = False
        with writing(path, as_whole=True):
            self._replace()

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        kind = "eval/" if any(name.startswith("eval/") for name in scalars) else ""
        kept = {name: value for name, value in self._now.items() if name.startswith("eval/") != bool(kind)}
        self._now = kept | {f"{kind}step": float(step), **scalars}
        try:
            self._replace()
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._warn(f"report.prometheus: {self._path}: cannot be written now ({error.strerror})")
            self._failed = True

    def close(self) -> None:
        """The file stays, with the last numbers; its age says that they are the last."""

    def _replace(self) -> None:
        draft = self._path.with_name(f".{self._path.name}.tmp")  # which node_exporter does not read
        draft.write_text(exposition(self._now, self._name), encoding="utf-8")
        draft.replace(self._path)


def exposition(scalars: Mapping[str, float], run: str) -> str:
    """Numbers by their names in Prometheus' text format: gauges, one family after the other."""
    families: dict[str, list[str]] = {}
    for name, value in scalars.items():
        path = name.split("/")
        head = path[:2] if path[0] == "eval" else path[:1]
        labels = {"run": run, **dict(zip(_LABELS.get(head[-1], ()), path[len(head) :], strict=False))}
        inside = ",".join(f'{key}="{word}"' for key, word in labels.items())  # plain words, all of them
        metric = "_".join(["ultrafuser", *head])
        families.setdefault(metric, []).append(f"{metric}{{{inside}}} {value!r}\n")
    return "".join(f"# TYPE {metric} gauge\n{''.join(lines)}" for metric, lines in families.items())
