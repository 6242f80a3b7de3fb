"""One rank's model and data, a step, a stage with its evaluations and checkpoints. What a run is made of: ``run``."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, read_progress
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.left_out import changing, is_kept, record_of
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.resume import data_record
from ultrafuser_mega.checkpoint.saver import Saver
from ultrafuser_mega.config import GATE, Stage, in_words
from ultrafuser_mega.data.batches import Shard, Steps, TrainingBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.steps_ahead import StepsAhead
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.store_watch import StoreWatch
from ultrafuser_mega.errors import DivergedError, InputError
from ultrafuser_mega.models.fused import train_parts
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.trained import part_shares
from ultrafuser_mega.reporting.parts_table import as_text, parts_table
from ultrafuser_mega.reporting.records import EvaluationResult, StepRecord
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.assembly import build_model, read_first_weights, read_resumed, run_sources
from ultrafuser_mega.training.best import Best, mean_loss
from ultrafuser_mega.training.divergence import ALLOWANCE, Judge, measured_loss, remedy
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.evaluation import evaluate
from ultrafuser_mega.training.lessons import Answering, begin_with, lessons_of
from ultrafuser_mega.training.measures import Measures
from ultrafuser_mega.training.optimizer import make_trainable
from ultrafuser_mega.training.profiling import StepProfiler
from ultrafuser_mega.training.skipping import RollBack, Skips, write_down
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
        self._went_back_to: Path | None = None
        self._told_bound = False
        self.plan, self.groups, self.store, self.device, self.shard = plan, groups, store, device, shard
        # Parts whose weights checkpoints hold; None: all.
        self._kept = changing(plan.config) if plan.config.checkpoint.weights == "trained" else None
        self.saver: Saver | None = None
        self.store_watch: StoreWatch | None = None
        self.phases = Phases(device)
        self.measures = Measures(plan, device, self.phases, peak_flops)
        self.profiler = StepProfiler(plan.config, groups.rank, device)
        self.model = build_model(plan, groups, device, self.phases)
        self.engine = Engine(self.model, groups, device, self.phases)

    def load(self) -> None:
        """Read the weights that the run begins with; those of the checkpoint that it resumes from, its stage reads."""
        plan, groups, options = self.plan, self.groups, self.plan.config.checkpoint
        sources = run_sources(plan).with_data(data_record(self.store)) if groups.rank == 0 else None
        if sources is not None and self._kept is not None:
            sources = sources.with_left_out(record_of(plan.config))
        self.saver = Saver(self.checkpoints, options.keep, options.keep_every, plan.identity, sources)
        self.store_watch = StoreWatch(self.store)
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
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.plan.config.run_dir / "checkpoints"

    def evaluate(self, *, trained: bool = True) -> EvaluationResult:
        """Evaluate the model as it is, ``trained`` or as it came; DivergedError where a loss is not finite."""
        begun, config = time.monotonic(), self.plan.config
        with self.phases("evaluation", whole=True):
            result = evaluate(self.engine, self.store, self.shard, config.evaluation, config.student)
        self.stopping.took("evaluation", time.monotonic() - begun)
        for class_name, losses in result.loss.items():
            for model in sorted(losses, key="fused".__eq__):  # a specialist first: the fused model inherits its NaN
                if not math.isfinite(losses[model]):
                    advice = self._remedy() if trained else "look at its weights"
                    raise DivergedError(f"held-out loss of {model} on {class_name} is {losses[model]}; {advice}")
        return result

    def train_stage(self, begin: Progress, report: RunReport) -> Stop | RollBack | None:
        """A stage from ``begin`` to its end, with evaluations and checkpoints on the way.

        Returns why it ends before: behind a checkpoint, after which an evaluation may be due, or in order to go back to
        one. None: the stage is over.

        Raises:
            DivergedError: the numbers are no longer finite, or the stage or the time ends with ruined weights.
        """
        number, done, config, stage = begin.stage, begin.step, self.plan.config, self.stage(begin.stage)
        batches, trainable = self.batches(number), self.make_trainable(number)
        if self.plan.resume is not None and self.plan.resume[0] == begin:
            read_resumed(self.plan, self.model, self.groups, trainable)
        first = self.global_step(Progress(number, 0))
        if done and self._evaluation_due(number, done):  # of the step resumed from: the run may have ended before it
            again, before = self.evaluate(), Best.of_run(config.run_dir, number, first, first + done - 1)
            if before.take(mean_loss(again)) and config.checkpoint.keep_best and self.saver is not None:
                self.saver.is_best(begin)
            report.evaluated(again, number, first + done)
        report.note(as_text(parts_table(f"stage {number} trains", part_shares(self.plan, number))))
        report.begin_stage(number, in_words(config.parts(number)), first + 1, stage.steps)
        if done == stage.steps:
            return None
        best = Best.of_run(config.run_dir, number, first, first + done)
        watched = config.checkpoint.keep_best or config.evaluation.patience is not None
        if best.since >= (config.evaluation.patience or math.inf):
            return None
        judge, owed, told = Judge(self._measured_loss(batches)), False, False
        skips = Skips(config.faults.skips, begin.skipped)
        begun = time.perf_counter()
        self.phases.restart()  # what came before belongs to no step
        lessons = lessons_of(self.plan, self.groups, batches, self.model, self.device, self.answering)
        given, waits = (batches, None) if lessons is None else (lessons, lessons.waits)
        steps = StepsAhead(given, done, stage.steps, self.device, waits)
        with self.watching(), steps as ahead:
            for step in range(done, stage.steps):
                if lessons is not None:
                    lessons.begin(step)
                with self.profiler.step(first + step + 1):
                    record, stop = self.step(number, trainable, ahead, step, begun)
                # What follows belongs to the next step, but for checkpoints and evaluations.
                begun = time.perf_counter()
                report.step(record)
                self._tell_saved(report)
                for line in filter(None, (self.measures.straggler, self.profiler.written(record.step))):
                    report.note(line)
                skips.count(record.skipped)
                progress = Progress(number, step + 1, skips.total)
                if record.skipped:
                    report.note(f"{self.place(progress)}: {_not_finite(record)}; skipped")
                    if self.groups.rank == 0:
                        write_down(config.run_dir, record, (lessons or batches.sampler).batch(step))
                if skips.too_many:
                    return self._roll_back(f"{self.place(progress)}: {_not_finite(record)}")
                evaluated, lowest = None, False
                if watched and stop is None and self._evaluation_due(number, step + 1, watched) and not record.skipped:
                    evaluated = self.evaluate()
                    lowest = best.take(mean_loss(evaluated))
                    begun = time.perf_counter()
                enough = best.since >= (config.evaluation.patience or math.inf)
                is_last = stop is not None or enough or step + 1 == stage.steps
                owed |= _due(step + 1, config.checkpoint.every) or (lowest and config.checkpoint.keep_best)
                # Not in the midst of skipped steps, which the run might go back into.
                if is_last or (owed and not record.skipped):
                    with self.phases("save", whole=True):
                        loss = self._measured_loss(batches)
                        problem = self._publish(
                            progress, trainable, judge, loss, report, best=lowest and config.checkpoint.keep_best
                        )
                    if problem and is_last:
                        raise DivergedError(f"{problem}; {self._remedy()}")
                    if problem and not told:
                        report.note(f"{problem}; no checkpoint until that has passed")
                    owed = told = problem is not None
                    begun = time.perf_counter()
                if stop is not None:
                    self._settle(report, must=True)
                    return replace(stop, why=f"{stop.why} behind {self.place(progress)}; --resume goes on from there")
                if evaluated is None and self._evaluation_due(number, step + 1):
                    evaluated = self.evaluate()
                    begun = time.perf_counter()
                if evaluated is not None and not (number == 2 and is_last):  # which run evaluates for its tables
                    report.evaluated(evaluated, number, first + step + 1)
                if enough:
                    report.note(
                        f"{self.place(progress)}: the stage ends: {best.since} evaluations without a lower mean "
                        f"held-out loss than {best.lowest:.4f}"
                    )
                    break
            self._settle(report, must=number == list(config.stages)[-1])
        return None

    def _roll_back(self, problem: str) -> RollBack:
        """To the newest checkpoint, which rank 0 chooses; DivergedError where there is none, or it did not help."""
        assert self.saver is not None
        self.saver.wait()  # what is being written is the newest then
        found = [list_checkpoints(self.checkpoints)[-1:]]
        dist.broadcast_object_list(found, src=0)
        if not found[0] or found[0][0][1] == self._went_back_to:
            again = " again" if found[0] else ""
            raise DivergedError(f"{problem}{again}; {self._remedy()}")
        self._went_back_to = found[0][0][1]
        return RollBack(read_progress(self._went_back_to, self.plan.identity), self._went_back_to)

    def _measured_loss(self, batches: TrainingBatches) -> float:
        begin_with(self.plan.config, self.model)
        return measured_loss(self.engine, self.store.class_names, batches.step(0).microbatches)

    def _evaluation_due(self, number: int, step: int, at_the_end: bool = False) -> bool:
        """After this step of the stage; the end of stage 2 is evaluated by ``run``, if not ``at_the_end`` as well."""
        if step == self.stage(number).steps:
            return number == 1 or at_the_end
        return _due(step, self.plan.config.evaluation.every)

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

    def _publish(
        self,
        progress: Progress,
        trainable: Trainable,
        judge: Judge,
        loss: float,
        report: RunReport,
        *,
        best: bool = False,
    ) -> str | None:
        """Write a checkpoint, unless the weights are ruined: then say so.

        Args:
            loss: of the weights as they are, measured.
            best: it has the stage's lowest held-out loss so far.
        """
        where = self.place(progress)
        trainable.settle()
        if progress.step == progress.skipped:
            return f"{where}: nothing has been updated yet"
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise DivergedError(f"{where}: weights are not finite; {self._remedy()}")
        if not judge.accepts(loss):
            return (
                f"{where}: ruined weights: their loss on the stage's first batch is {loss:.4g}, "
                f"more than {ALLOWANCE:.2g} above the {judge.lowest:.4g} that it was"
            )
        assert self.saver is not None and self.store_watch is not None
        if line := self.store_watch.look():
            report.note(line)
        chunks, kept = chunks_to_write(self.model, trainable, self.groups), self._kept
        self.saver.save(progress, [chunk for chunk in chunks if kept is None or is_kept(chunk.key, kept)], best=best)
        return None

    def _tell_saved(self, report: RunReport) -> None:
        assert self.saver is not None
        for line in self.saver.news():
            report.note(line)
        if self.saver.seconds:
            self.stopping.took("checkpoint", self.saver.seconds)
            if not self._told_bound:
                self._told_bound = True
                report.note(self.stopping.bound)

    def _settle(self, report: RunReport, *, must: bool) -> None:
        """Wait for the checkpoint that is being written; InputError where it cannot be but ``must``."""
        assert self.saver is not None
        problem = self.saver.wait()
        if problem is not None and must:
            raise InputError(problem)
        self._tell_saved(report)

    def _remedy(self) -> str:
        if self.saver is not None:
            self.saver.wait()  # what is being written is good, and the newest then
        return remedy(self.checkpoints)


def _not_finite(record: StepRecord) -> str:
    return f"loss is {record.loss:.6g}, gradient norm {record.grad_norm:.6g}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
