"""One rank's model and data, a step of it, and its evaluation. What a stage is made of: ``stage``; a run: ``run``."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import GATE, Stage
from ultrafuser_mega.data.batches import Shard, Steps, TrainingBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import DivergedError
from ultrafuser_mega.models.fused import train_parts
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.records import EvaluationResult, StepRecord
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.assembly import build_model, read_first_weights
from ultrafuser_mega.training.checkpoints import RunCheckpoints
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.evaluation import evaluate
from ultrafuser_mega.training.lessons import Answering
from ultrafuser_mega.training.measures import Measures
from ultrafuser_mega.training.optimizer import make_trainable
from ultrafuser_mega.training.profiling import StepProfiler
from ultrafuser_mega.training.stopping import Stop, Stopping
from ultrafuser_mega.training.totals import ClassTotals, gate_column


class Trainer:
    """One rank's model and data, and the steps that train it.

    Building one reads no file: the weights come by :meth:`load`.

    Args:
        plan: of the run.
        groups: this rank's process groups.
        store: the run's token store.
        device: where this rank computes.
        shard: this rank's part of the data-parallel work.
        begun: when the run began, by ``time.monotonic``; None: now.
        peak_flops: of each GPU; None: not known.
        answering: of models, for a student that learns from answers.
    """

    def __init__(
        self,
        plan: RunPlan,
        groups: RankGroups,
        store: TokenStore,
        device: torch.device,
        shard: Shard,
        begun: float | None = None,
        peak_flops: float | None = None,
        answering: Answering | None = None,
    ) -> None:
        self.answering = answering
        begun = time.monotonic() if begun is None else begun
        self.stopping = Stopping(begun, plan.config.checkpoint.stop_after_minutes)
        self.watching: Callable[[], AbstractContextManager[None]] = nullcontext  # while steps are done
        self.at = (0, "before the first step")  # steps through both stages, and that for people
        self.plan, self.groups, self.store, self.device, self.shard = plan, groups, store, device, shard
        self._saved: RunCheckpoints | None = None
        self.phases = Phases(device)
        self.measures = Measures(plan, device, self.phases, peak_flops)
        self.profiler = StepProfiler(plan.config, groups.rank, device)
        self.model = build_model(plan, groups, device, self.phases)
        self.engine = Engine(self.model, groups, device, self.phases)

    def load(self) -> None:
        """Read the weights that the run begins with; those of the checkpoint that it resumes from, its stage reads."""
        plan, groups = self.plan, self.groups
        self._saved = RunCheckpoints(plan, self.model, groups, self.store, self.stopping)
        if plan.resume is None:
            read_first_weights(plan, self.model, groups)

    def stage(self, number: int) -> Stage:
        """Configuration of stage 1 or 2."""
        return self.plan.config.stage1 if number == 1 else self.plan.config.stage2

    def global_step(self, progress: Progress) -> int:
        """Steps done since the start of stage 1."""
        return progress.step + (self.stage(1).steps if progress.stage == 2 else 0)

    def place(self, progress: Progress) -> str:
        """Where in the run this is, for people."""
        return f"stage {progress.stage} step {progress.step} of {self.stage(progress.stage).steps}"

    @property
    def saved(self) -> RunCheckpoints:
        """The run's checkpoints; there from :meth:`load` on."""
        assert self._saved is not None
        return self._saved

    def evaluate(self, *, trained: bool = True) -> EvaluationResult:
        """Evaluate the model as it is, ``trained`` or as it came; DivergedError where a loss is not finite."""
        begun, config = time.monotonic(), self.plan.config
        with self.phases("evaluation", whole=True):
            result = evaluate(self.engine, self.store, self.shard, config.evaluation, config.student)
        self.stopping.took("evaluation", time.monotonic() - begun)
        for class_name, losses in result.loss.items():
            for model in sorted(losses, key="fused".__eq__):  # a specialist first: the fused model inherits its NaN
                if not math.isfinite(losses[model]):
                    advice = self.saved.remedy() if trained else "look at its weights"
                    raise DivergedError(f"held-out loss of {model} on {class_name} is {losses[model]}; {advice}")
        return result

    def batches(self, number: int) -> TrainingBatches:
        """What the stage trains on."""
        config, samples = self.plan.config, self.stage(number).samples_per_class
        how = config.data.sampling, config.data.file_weights
        return TrainingBatches(self.store, samples, config.seed + number, self.shard, *how)

    def make_trainable(self, number: int) -> Trainable:
        """What the stage trains of this rank's share: by default in stage 1 the gate, in stage 2 everything."""
        gc.collect()  # the last stage's optimizer and gradient buffers, which hold each other
        config = self.plan.config
        parts = config.parts(number)
        train_parts(self.model, {name: part.mode for name, part in parts.items()})
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        beside_gate = any(part.trains for name, part in parts.items() if name != GATE)
        return make_trainable(
            self.model,
            self.model.config,
            self.groups.megatron,
            self.stage(number),
            config.optimizer,
            distributed_optimizer=config.parallel.distributed_optimizer and beside_gate and trains,
            overlap=self.model.has_backward,
            device=self.device,
            parts=parts.values(),
            phases=self.phases,
        )

    def step(
        self, number: int, trainable: Trainable, batches: Steps, step: int, begun: float
    ) -> tuple[StepRecord, Stop | None]:
        """Step ``step`` (from 0) of a stage, which began at ``begun`` by ``time.perf_counter``.

        Nothing is updated where the loss or a gradient is not finite. Returns why the run is to stop, too.
        """
        asked = time.perf_counter()
        progress, config = Progress(number, step + 1), self.plan.config
        self.at = (self.global_step(progress), self.place(progress))
        with self.phases("data"):
            batch = batches.step(step)
        data_seconds = time.perf_counter() - asked
        totals = ClassTotals(self.store.class_names, ["loss", *map(gate_column, config.fused)], self.device)
        terms = batch.response_tokens if config.loss.normalize == "token" else batch.samples

        def loss_of(hidden: dict[str, Tensor], microbatch: MicroBatch) -> Tensor:
            fusion, exchange = self.model.fusion, self.model.exchange
            assert fusion is not None and exchange is not None
            with torch.enable_grad():
                everyone = exchange(hidden)
                with self.phases("loss"):
                    loss, rows, weights = fusion.loss(everyone, microbatch.targets)
                    del everyone  # until its backward the loss holds them
                    loss = loss / terms
            if not self.model.has_backward:
                with self.phases("backward"):
                    loss.backward()
            totals.add(microbatch.row_class, torch.cat([rows[:, None].to(weights.dtype), weights], dim=1))
            return loss

        trainable.zero_grad()
        if self.model.has_backward:
            with self.model.dropping(f"{config.seed}/{number}/{step}/{self.groups.replica_index}"):
                self.engine.train(trainable.wrapped, batch.microbatches, loss_of)
        else:  # of no specialist that this rank has a stage of: the loss sees to gate and heads
            self.engine.forward(batch.microbatches, loss_of)
            trainable.reduce_gradients()
        with self.phases("optimizer"):
            norm = trainable.clip_gradients()
        own = self.measures.own(norm, data_seconds, self.stopping.wanted)
        with self.phases("end of step"):
            reduced = totals.reduce(self.groups, own)
        measured = self.measures.read(reduced.ranks, batch)
        loss = sum(row["loss"] * reduced.counts[name] for name, row in reduced.means.items()) / terms
        skipped = not (math.isfinite(loss) and math.isfinite(measured.grad_norm))
        with self.phases("optimizer"):
            rates = trainable.update(skip=skipped)
        self.phases.end_step()
        done, seconds = self.global_step(progress), time.perf_counter() - begun
        self.stopping.took("step", seconds)
        record = self.measures.record(
            measured, reduced, batch, stage=number, step=done, loss=loss, rates=rates, seconds=seconds, skipped=skipped
        )
        return record, self.stopping.agreed(measured.wanted)
