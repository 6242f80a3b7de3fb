"""What a run records, and where it keeps it: metrics.jsonl, from which others have it (sinks.py), and summary.json.

Losses are mean response-token cross-entropies in nats. A *class* is a kind of data ("text"), a
*specialist* is a model ("text" as well, often), a *model* is "fused" or a specialist on its own.
Steps count from 1 through both stages, so that the last step of stage 1 is N1 and stage 2 goes on
from N1 + 1; step 0 is the state before training.

A gate weight is averaged in one of two ways. *Per token*: over all response tokens, so that long responses count for
more; everything that is called ``gate`` here and in metrics.jsonl (which resumed runs read back and go on with), and
``gate_per_token`` in summary.json. *Per sample*: over a sample's response tokens first, then over samples.

*Yardsticks* are what the specialists could do together without training: their mean, of logits or of probabilities, and
an oracle that takes the best of them for every class, sample or token. No gate that chooses among them goes below the
last, and a router that knows the class is the first oracle.

Not here: computing any of these numbers (training) and showing them (console, tables, plots).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.reporting.sinks import Sink, TensorBoard, scalars_of

FUSED = "fused"
TEACHER = "teacher"  # the fused model where a student is trained, which then is what is called fused
MEAN = "mean"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
UNIFORM_LOGITS, UNIFORM_PROBABILITIES = "uniform logits", "uniform probabilities"
ORACLE_PER_CLASS, ORACLE_PER_SAMPLE, ORACLE_PER_TOKEN = "oracle per class", "oracle per sample", "oracle per token"
YARDSTICKS = (UNIFORM_LOGITS, UNIFORM_PROBABILITIES, ORACLE_PER_CLASS, ORACLE_PER_SAMPLE, ORACLE_PER_TOKEN)
PER_TOKEN = "gate_per_token"  # in summary.json, beside gate_per_sample

PhaseSeconds = Mapping[str, Mapping[str, float]]
Losses = Mapping[str, Mapping[str, float]]  # class -> model or yardstick -> nats
GateWeights = Mapping[str, Mapping[str, float]]  # class -> specialist -> average weight


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step over one global batch."""

    stage: int  # 1: by default the gate only, 2: everything
    step: int  # from 1, through both stages
    loss: float  # nats, over the response tokens of the global batch
    class_loss: Mapping[str, float]  # class -> nats
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # response tokens of the global batch: those that carry the loss
    tokens_per_s: float  # response tokens per second of the whole step
    gate: GateWeights  # per token
    seconds: float  # wall time of the whole step: data to update, and the logging of the step before
    # nan in what earlier versions wrote:
    processed_tokens: float = math.nan  # prompts and responses of the global batch, for every specialist, no padding
    data_seconds: float = math.nan  # of ``seconds``, spent waiting for the microbatches; the slowest rank's
    peak_memory_bytes: float = math.nan  # at most so far, allocated by CUDA or resident on the CPU; of the largest rank
    padding: float = math.nan  # share of all processed positions that are padding
    imbalance: float = math.nan  # tokens of the busiest replica, in parts of the mean
    fill: float = math.nan  # tokens of the mean microbatch, in parts of microbatch_tokens
    gate_lr: float = math.nan  # the gate's rate, which may be another than ``lr``
    part_lr: Mapping[str, float] = field(default_factory=dict)  # of other parts that have a rate of their own
    skipped: bool = False  # nothing was updated, since the loss or a gradient is not finite
    memory_bytes: float = math.nan  # held at the step's end, counted as peak_memory_bytes
    mfu: float = math.nan  # FLOPs that the model needs for the step, in parts of all GPUs' peak; nan: peak not known
    save_seconds: float = math.nan  # that training stood still for saves, since the process began
    phases: PhaseSeconds = field(default_factory=dict)  # of the step BEFORE: phase -> seconds of "mean", "worst" rank


@dataclass(frozen=True)
class SampleGate:
    """What the gate did on one held-out sample of T response tokens."""

    class_name: str
    index: int  # in the class's held-out split
    weights: np.ndarray  # (T, n)
    losses: np.ndarray  # (T,) of the fused model


@dataclass(frozen=True)
class EvaluationResult:
    """Mean losses and gate weights over response tokens; ``samples`` on rank 0 only."""

    loss: dict[str, dict[str, float]]  # class -> "fused" or specialist -> nats
    gate: dict[str, dict[str, float]]  # class -> specialist -> weight, per token
    yardsticks: dict[str, dict[str, float]]  # class -> yardstick -> nats
    samples: list[SampleGate]

    def sample_weights(self) -> np.ndarray:
        """(samples, n): every sample's gate weights, averaged over its response tokens."""
        return np.stack([sample.weights.mean(axis=0) for sample in self.samples])

    def gate_per_sample(self) -> dict[str, dict[str, float]]:
        """class -> specialist -> weight, per sample."""
        classes, weights = np.array([sample.class_name for sample in self.samples]), self.sample_weights()
        return {
            name: dict(zip(row, weights[classes == name].mean(axis=0).tolist(), strict=True))
            for name, row in self.gate.items()
        }


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One pass over the held-out data. ``loss`` may leave out the specialists (they need no re-evaluation)."""

    stage: int
    step: int
    loss: Losses
    gate: GateWeights
    yardsticks: Losses = field(default_factory=dict)  # empty in what earlier versions wrote

    def __post_init__(self) -> None:
        if MEAN in self.loss:
            raise InputError(f'class name "{MEAN}" is taken by the mean over classes; name the class otherwise')
        if any(FUSED in weights for weights in self.gate.values()):
            raise InputError(f'specialist name "{FUSED}" is taken by the fused model; name the specialist otherwise')

    @property
    def classes(self) -> list[str]:
        return list(self.loss)

    @property
    def models(self) -> list[str]:
        """Every model with a loss on some class: "fused" first, the rest as they first appear."""
        names = dict.fromkeys(name for losses in self.loss.values() for name in losses)
        return sorted(names, key=lambda name: name != FUSED)

    @property
    def specialists(self) -> list[str]:
        """Every specialist with a gate weight on some class."""
        return list(dict.fromkeys(name for weights in self.gate.values() for name in weights))

    @property
    def mean(self) -> dict[str, float]:
        """Model -> unweighted mean over the classes, for the models that were evaluated on all of them."""
        return _means(self.loss, self.models)

    @property
    def yardstick_means(self) -> dict[str, float]:
        """Yardstick -> unweighted mean over the classes; empty where there are none."""
        return _means(self.yardsticks, YARDSTICKS) if self.yardsticks else {}


def _means(losses: Losses, names: Iterable[str]) -> dict[str, float]:
    """Of the names that every class has."""
    everywhere = [name for name in names if all(name in row for row in losses.values())]
    return {name: math.fsum(row[name] for row in losses.values()) / len(losses) for name in everywhere}


Record = StepRecord | EvalRecord
_KINDS: dict[str, type[StepRecord] | type[EvalRecord]] = {"step": StepRecord, "eval": EvalRecord}


class MetricsWriter:
    """Appends records to ``run_dir/metrics.jsonl``, and gives their numbers to TensorBoard and other sinks.

    metrics.jsonl holds one JSON object per line, each written at once, so that it can be followed
    while the run goes on. A number that is not finite is written as ``null``.

    Args:
        run_dir: made if missing.
        resume_step: the step whose checkpoint the run goes on from: records up to and including it are kept, later
            ones (of the run that was cut off) are dropped, as is this step's own evaluation, which follows the
            checkpoint and is done again. None is a fresh run: it replaces the records of an earlier run.
        sinks: that also take the numbers, beside event files in ``run_dir/tensorboard``; closed with the writer.

    Raises:
        InputError: a line of an existing metrics.jsonl is damaged (a last line that was cut off is not
            damage: it is dropped).
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, sinks: Sequence[Sink] = ()) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        kept = []
        if resume_step is not None:
            kept = [line for line, data in _lines(path) if data["step"] < resume_step + (data["kind"] == "step")]
        write_atomically(path, "".join(kept))
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        self._sinks = [TensorBoard(run_dir, 0 if resume_step is None else resume_step + 1), *sinks]

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        for sink in self._sinks:
            sink.close()

    def write_step(self, record: StepRecord) -> None:
        """A step was done."""
        fields = self._append("step", record)
        self._give({name: value for name, value in fields.items() if name != "step"}, record.step)

    def write_eval(self, record: EvalRecord) -> None:
        """An evaluation was done; sinks get the mean over the classes as well."""
        fields = self._append("eval", record)
        means = {MEAN: record.yardstick_means} if record.yardsticks else {}
        evaluated = {
            "loss": {**record.loss, MEAN: record.mean},
            "yardsticks": {**record.yardsticks, **means},
            "gate": fields["gate"],
        }
        self._give({"eval": evaluated}, record.step)

    def _append(self, kind: str, record: Record) -> dict[str, Any]:
        fields = asdict(record)
        self._lines.write(_json({"kind": kind, **fields}) + "\n")
        return fields

    def _give(self, fields: Mapping[str, Any], step: int) -> None:
        scalars = scalars_of(fields)
        for sink in self._sinks:
            sink.write(scalars, step)


def read_metrics(run_dir: str | Path) -> tuple[list[StepRecord], list[EvalRecord]]:
    """Every record of ``run_dir/metrics.jsonl`` in the order written; ``null`` comes back as nan.

    Raises:
        InputError: the file is missing or one of its lines is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run that has trained")
    steps: list[StepRecord] = []
    evals: list[EvalRecord] = []
    for number, (_, data) in enumerate(_lines(path), start=1):
        fields = {name: value for name, value in data.items() if name != "kind"}
        try:
            record = _KINDS[data["kind"]](**_nan_for_null(fields))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} line {number}: not a record of this program ({error})") from None
        if isinstance(record, StepRecord):
            steps.append(record)
        else:
            evals.append(record)
    return steps, evals


def build_summary(
    final: EvalRecord,
    *,
    tokens_per_s: float,
    steps: int,
    layout: str,
    device: str,
    wall_s: float,
    after_stage1: EvalRecord | None = None,
    gate_per_sample: GateWeights | None = None,
) -> dict[str, Any]:
    """The contents of summary.json, nested: eval.<class>.<model>, eval.mean.<model>, yardsticks likewise,
    gate_per_token.<class>.<specialist>, gate_per_sample.<class>.<specialist>, train.tokens_per_s (response tokens),
    steps, layout, device, wall_s; ``after_stage1`` holds an eval and a gate_per_token of its own."""
    summary = {
        **_eval_summary(final),
        "train": {"tokens_per_s": tokens_per_s},
        "steps": steps,
        "layout": layout,
        "device": device,
        "wall_s": wall_s,
    }
    if gate_per_sample is not None:
        summary["gate_per_sample"] = gate_per_sample
    if after_stage1 is not None:
        summary["after_stage1"] = _eval_summary(after_stage1)
    return summary


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``run_dir/summary.json`` so that a reader finds the old file or the new one, never half of one."""
    path = Path(run_dir) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _json(summary, indent=2) + "\n")
    return path


def _eval_summary(record: EvalRecord) -> dict[str, Any]:
    losses = {name: dict(models) for name, models in record.loss.items()}
    gate = {name: dict(weights) for name, weights in record.gate.items()}
    summary: dict[str, Any] = {"eval": {**losses, MEAN: record.mean}, PER_TOKEN: gate}
    if record.yardsticks:
        summary["yardsticks"] = {**record.yardsticks, MEAN: record.yardstick_means}
    return summary


def _json(data: object, indent: int | None = None) -> str:
    return json.dumps(_plain(data), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Only what JSON knows: numpy and torch scalars become Python numbers, non-finite ones None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _nan_for_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nan_for_null(item) for key, item in value.items()}
    return math.nan if value is None else value


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line of a metrics file with its parsed object; a last line without a newline was cut off."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                data = json.loads(line)
            except json.JSONDecodeError:
                data = None
            if not isinstance(data, dict) or not isinstance(data.get("step"), int):
                raise InputError(f"{path} line {number}: damaged ({line[:60].rstrip()!r}); remove that line")
            yield line, data
