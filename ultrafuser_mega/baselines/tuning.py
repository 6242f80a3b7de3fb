"""Further training of one model of transformers on a run's data: its token store, sampler, batches, rates and AdamW.

For models that are no specialists (a mixture of experts, a model that learns from others); a specialist is trained by
the trainer. One process, on a CPU or a GPU; float32 weights, computed in bf16 where the configuration says so. What the
trainer means by a step, a rate, decay and clipping is meant here: a dense model ends with the weights that the trainer
gives it (a test holds that).

The run's folder has the configuration, ``metrics.jsonl`` and ``summary.json`` as the trainer writes them, and in place
of checkpoints ``state.pt``, the newest state, written every ``checkpoint.every`` steps and on a signal.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ultrafuser_mega.baselines.heldout import Model, heldout_losses, whole_shard
from ultrafuser_mega.config import FuserConfig, Loss, dump_config
from ultrafuser_mega.data.batches import StepBatch, TrainingBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.steps_ahead import StepsAhead
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import DivergedError, InputError, writing
from ultrafuser_mega.reporting.console import TrainConsole
from ultrafuser_mega.reporting.records import (
    FUSED,
    EvalRecord,
    MetricsWriter,
    StepRecord,
    build_summary,
    read_metrics,
    write_summary,
)
from ultrafuser_mega.training.optimizer import make_schedule
from ultrafuser_mega.training.run_folder import locked_run, set_aside
from ultrafuser_mega.training.stopping import Stop, Stopping

STATE = "state.pt"
_STAGE = 2


@dataclass(frozen=True)
class MicroLoss:
    """What a microbatch of N response tokens has lost.

    Attributes:
        rows: (N,) nats, to be minimised.
        extra: () more to be minimised, of the microbatch as a whole, such as a loss that balances experts.
        total: () the rows' sum, of which the gradient is taken; None: of the rows themselves.
    """

    rows: Tensor
    extra: Tensor | float = 0.0
    total: Tensor | None = None


LossOf = Callable[[Model, MicroBatch], MicroLoss]


@dataclass(frozen=True)
class Tuning:
    """A run of further training.

    Attributes:
        config: of the run, whose stage 1 has no steps.
        store: its token store.
        forms: specialists in whose forms samples are laid out; the model's own is the first.
        identity: of the method: what must stay for a run to go on.
        title: of what is trained, for people.
    """

    config: FuserConfig
    store: TokenStore
    forms: tuple[str, ...]
    identity: Mapping[str, Any]
    title: str

    @property
    def state(self) -> Path:
        """Where the newest state is."""
        return self.config.run_dir / STATE

    @property
    def whole_identity(self) -> dict[str, Any]:
        """What a state must have been written by to go on from."""
        stage, optimizer = self.config.stage2, self.config.optimizer
        own: dict[str, Any] = {
            "steps": stage.steps,
            "samples_per_class": stage.samples_per_class,
            "seed": self.config.seed,
        }
        own["sampling"] = self.config.data.sampling
        return {**own, "data": self.store.fingerprint, "weight_decay": optimizer.weight_decay, **self.identity}


def row_losses(logits: Tensor, targets: Tensor, options: Loss) -> Tensor:
    """(N,) of float logits (N, V): cross-entropy with the configured label smoothing and z-loss."""
    rows = cross_entropy(logits, targets, reduction="none", label_smoothing=options.label_smoothing)
    return rows + options.z_loss * logits.logsumexp(1).square() if options.z_loss else rows


def tune(model: Model, run: Tuning, loss_of: LossOf, *, resume: bool = False) -> Stop | None:
    """Train ``model``, in place, to the run's last step; returns why it stopped before, behind a saved state.

    Args:
        model: in float32, where it is to be trained.
        run: data, rates, and where the results go.
        loss_of: the loss of a microbatch.
        resume: go on from the newest state; of a run that is over only that is loaded.

    Raises:
        InputError: there is no state to go on from, or it is another run's.
        DivergedError: a loss or gradient is not finite.
    """
    config, done = run.config, 0
    with ExitStack() as stack:
        stack.enter_context(locked_run(config.run_dir, enabled=True))
        state = read_state(run) if resume else None
        kept = set_aside(config.run_dir) if state is None else None
        optimizer = _optimizer(model, config)
        schedule = make_schedule(optimizer, config.stage2, config.optimizer.weight_decay)
        if state is not None:
            done = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.step(done)
        resumed, state = state is not None, None  # it is as large as all that is trained
        with writing(config.run_dir):
            (config.run_dir / "config.yaml").write_text(dump_config(config))
        begun = time.monotonic()
        stopping = Stopping(begun, config.checkpoint.stop_after_minutes)
        console = stack.enter_context(TrainConsole(enabled=True))
        writer = stack.enter_context(MetricsWriter(config.run_dir, resume_step=done if resumed else None))
        if kept:
            console.note(f"an earlier run of this name is kept as {kept}")
        loop = _Loop(model, run, loss_of, optimizer, schedule, writer, console)
        if not done:
            loop.evaluate(0)
        steps = config.stage2.steps
        console.begin_stage(_STAGE, run.title, first_step=1, steps=steps)
        stack.enter_context(stopping.listening())
        if done < steps:
            shard = whole_shard(config, run.store, *run.forms)
            samples, seed = config.stage2.samples_per_class, config.seed + _STAGE
            data = config.data
            batches = TrainingBatches(run.store, samples, seed, shard, data.sampling, data.file_weights)
            ahead = stack.enter_context(StepsAhead(batches, done, steps, loop.device))
            for step in range(done, steps):
                loop.step(step, ahead.step(step))
                stop = Stopping.agreed(stopping.wanted)
                if stop or step + 1 == steps or _due(step + 1, config.checkpoint.every):
                    _write_state(run, model, optimizer, step + 1)
                if stop and step + 1 < steps:
                    console.end_stage()
                    console.note(f"{stop.why} behind step {step + 1} of {steps}; --resume goes on from there")
                    return stop
                if step + 1 < steps and _due(step + 1, config.evaluation.every):
                    loop.evaluate(step + 1)
        console.end_stage()
        loop.finish(begun)
    return None


class _Loop:
    """The model with its optimizer, and what its steps and evaluations tell."""

    def __init__(
        self,
        model: Model,
        run: Tuning,
        loss_of: LossOf,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        writer: MetricsWriter,
        console: TrainConsole,
    ) -> None:
        self.model, self.run, self.loss_of = model, run, loss_of
        self.optimizer, self.schedule, self.writer, self.console = optimizer, schedule, writer, console
        self.device: torch.device = next(model.parameters()).device

    def step(self, step: int, batch: StepBatch) -> None:
        """Step ``step``, from 0."""
        config, names, begun = self.run.config, self.run.store.class_names, time.perf_counter()
        terms = batch.response_tokens if config.loss.normalize == "token" else batch.samples
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        objective = 0.0
        self.model.train()
        self.optimizer.zero_grad()
        for microbatch in batch.microbatches:
            placed = microbatch.to(self.device)
            with self.computing():
                lost = self.loss_of(self.model, placed)
            share = len(lost.rows) / batch.response_tokens
            total = lost.rows.sum() if lost.total is None else lost.total
            loss = total / terms + share * torch.as_tensor(lost.extra, device=self.device)
            loss.backward()
            rows = lost.rows.detach().double().cpu()
            sums[0].index_add_(0, microbatch.row_class, rows)
            sums[1].index_add_(0, microbatch.row_class, torch.ones_like(rows))
            objective += loss.item()
        limit = config.optimizer.clip_grad or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not (math.isfinite(objective) and math.isfinite(norm)):
            raise DivergedError(
                f"step {step + 1} of {config.stage2.steps}: loss {objective:g}, gradient norm {norm:g}; "
                + ("--resume goes on from the newest state" if self.run.state.is_file() else "start afresh")
                + " with a smaller stage2.lr"
            )
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.schedule.step(1)
        seconds = time.perf_counter() - begun
        means = (sums[0] / sums[1]).tolist()
        record = StepRecord(
            stage=_STAGE,
            step=step + 1,
            loss=objective,
            class_loss={name: mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)},
            lr=lr,
            grad_norm=norm,
            tokens=batch.response_tokens,
            tokens_per_s=batch.response_tokens / seconds,
            gate={},
            seconds=seconds,
        )
        self.writer.write_step(record)
        self.console.step(record)

    def evaluate(self, step: int) -> EvalRecord:
        """Held-out losses behind ``step`` steps."""
        with self.computing():
            losses = heldout_losses(self.model, self.run.store, self.run.config, self.run.forms[0])
        named = {name: {FUSED: loss} for name, loss in losses.items()}
        record = EvalRecord(stage=_STAGE, step=step, loss=named, gate={})
        self.writer.write_eval(record)
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.console.note(f"held-out loss after step {step}: {shown}  mean {record.mean[FUSED]:.4f}")
        return record

    def finish(self, begun: float) -> None:
        """The last evaluation and ``summary.json``."""
        run_dir, steps = self.run.config.run_dir, self.run.config.stage2.steps
        final = self.evaluate(steps)
        records, _ = read_metrics(run_dir)
        seconds = sum(record.seconds for record in records)
        summary = build_summary(
            final,
            tokens_per_s=sum(record.tokens for record in records) / seconds if seconds else 0.0,
            steps=steps,
            layout="one process",
            device=str(self.device),
            wall_s=time.monotonic() - begun,
        )
        write_summary(run_dir, summary)

    def computing(self) -> AbstractContextManager[Any]:
        """bf16 where the configuration says so; weights and their updates stay in float32."""
        if self.run.config.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _optimizer(model: Model, config: FuserConfig) -> torch.optim.AdamW:
    """AdamW as the trainer has it: matrices decay, biases and norms do not."""
    options = config.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.stage2.lr, betas=(options.beta1, options.beta2), eps=options.eps, fused=True
    )


def read_state(run: Tuning) -> dict[str, Any]:
    """The newest state; raises InputError where there is none, or one of another run."""
    if not run.state.is_file():
        raise InputError(f"--resume: {run.state}: no such file; start without --resume")
    try:
        state: dict[str, Any] = torch.load(run.state, map_location="cpu", weights_only=True)
        found = json.loads(state["identity"])
    except Exception as error:  # whatever a damaged pickle raises
        raise InputError(f"{run.state}: damaged ({type(error).__name__}); start without --resume") from None
    for key, wanted in json.loads(json.dumps(run.whole_identity)).items():
        if found.get(key) != wanted:
            raise InputError(
                f"--resume: {run.state} was written with {key} = {found.get(key)}, not {wanted}; "
                "set it back, or start without --resume"
            )
    return state


def _write_state(run: Tuning, model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The old one or the new one is there, whatever happens."""
    draft = run.state.with_name(f".{STATE}.partial")
    state = {
        "step": step,
        "identity": json.dumps(run.whole_identity),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with writing(run.state, as_whole=True):
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(run.state)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
