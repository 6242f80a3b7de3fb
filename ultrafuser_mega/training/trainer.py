"""The whole run: prepare, stage 1 (gate only), stage 2 (everything), evaluate, checkpoint, report.

Algorithm 1 of the paper. Read :func:`run` first: it is the table of contents.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultrafuser_mega.checkpoint.checkpoint import (
    Progress,
    list_checkpoints,
    load_checkpoint,
    read_progress,
    save_checkpoint,
    verify_checkpoint,
)
from ultrafuser_mega.checkpoint.resume import data_record
from ultrafuser_mega.checkpoint.sources import SourceFiles, Sources
from ultrafuser_mega.config import Stage, dump_config
from ultrafuser_mega.data.batches import Shard, Steps, TrainingBatches
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.report import PrepareReport
from ultrafuser_mega.data.steps_ahead import StepsAhead
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import DivergedError
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.models.fused import FusedStage, build_fused_stage, load_hf_weights
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.planning.preflight import RunPlan, compared_with_data
from ultrafuser_mega.reporting.records import EvaluationResult, StepRecord
from ultrafuser_mega.reporting.run_report import RunFacts, RunReport
from ultrafuser_mega.runtime.device import peak_memory, to_device
from ultrafuser_mega.runtime.groups import RankGroups, make_groups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.divergence import ALLOWANCE, Judge, measured_loss, remedy
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.evaluation import evaluate
from ultrafuser_mega.training.optimizer import make_trainable
from ultrafuser_mega.training.prepare import data_notes, open_store
from ultrafuser_mega.training.run_folder import begin_run, locked_run
from ultrafuser_mega.training.skipping import RollBack, Skips, write_down
from ultrafuser_mega.training.stopping import Stop, Stopping
from ultrafuser_mega.training.token_samples import token_samples
from ultrafuser_mega.training.totals import ClassTotals

STAGE_TITLES = {1: "gate only", 2: "everything"}


def run(plan: RunPlan, device: torch.device) -> Stop | None:
    """Train and report as ``plan`` says; collective over the job, which must be joined already.

    Returns why the run stopped before its end, behind a checkpoint; None: it did not.
    """
    begun = time.monotonic()
    groups = make_groups(plan.layout)
    with locked_run(plan.config.run_dir, enabled=groups.rank == 0):
        if (weights := plan.resume or plan.start) is not None:
            verify_checkpoint(weights[1])
        store = open_store(plan, groups)
        plan = compared_with_data(plan, store)
        trainer = Trainer(plan, groups, store, device, make_shard(plan, groups), begun)
        trainer.load()
        while isinstance(end := _run(plan, groups, trainer), RollBack):
            plan = trainer.plan = replace(plan, resume=(end.progress, end.path), changes=())
        return end


def _run(plan: RunPlan, groups: RankGroups, trainer: Trainer) -> Stop | RollBack | None:
    done = plan.resume[0] if plan.resume else Progress(1, 0)
    # Only now: what could be wrong with the input has been seen, and the earlier run was where it was until here.
    kept = begin_run(plan.config.run_dir, fresh=plan.resume is None) if groups.rank == 0 else None
    begun = trainer.global_step(done)
    with RunReport(run_facts(plan, trainer.device), enabled=groups.rank == 0, done_steps=begun) as report:
        if kept:
            report.note(f"an earlier run of this name is kept as {kept}")
        for line in plan.changes if plan.resume else plan.notices:
            report.note(line)
        store = trainer.store
        for line in data_notes(plan.config, PrepareReport(store.folder, store.manifest, reused=True)):
            report.note(line)
        if plan.start and not plan.resume:
            report.note(f"begins with the weights of {plan.start[1]}")
        if plan.resume is not None and done == Progress(1, 0):  # weights that were imported, nothing trained yet
            load_checkpoint(plan.resume[1], trainer.model, groups, None, 0)
        if done == Progress(1, 0):
            report.evaluated(trainer.evaluate(trained=False), done.stage, 0)
        for stage in plan.config.stages:
            begin = done if done.stage == stage else Progress(stage, 0)
            if done.stage <= stage and (end := trainer.train_stage(begin, report)):
                report.note(end.why)
                return end
        final = trainer.evaluate()
        report.finish(final, token_samples(plan.config, trainer.store, final) if groups.rank == 0 else [])
    return None


def run_facts(plan: RunPlan, device: torch.device) -> RunFacts:
    """What the report says of the run that ``plan`` describes."""
    config = plan.config
    return RunFacts(
        name=config.name,
        run_dir=config.run_dir,
        config_text=dump_config(config),
        layout=plan.layout.describe(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        specialists=list(config.specialists),
        stage_steps=(config.stage1.steps, config.stage2.steps),
        resumed_from=plan.resume[1] if plan.resume else None,
    )


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
    """

    def __init__(
        self,
        plan: RunPlan,
        groups: RankGroups,
        store: TokenStore,
        device: torch.device,
        shard: Shard,
        begun: float | None = None,
    ) -> None:
        begun = time.monotonic() if begun is None else begun
        self.stopping = Stopping(begun, plan.config.checkpoint.stop_after_minutes)
        self._went_back_to: Path | None = None
        self.plan, self.groups, self.store, self.device, self.shard = plan, groups, store, device, shard
        self.sources: SourceFiles | None = None  # what checkpoints keep of the specialists; rank 0's
        self.model = build_model(plan, groups, device)
        self.engine = Engine(self.model, groups, device)

    def load(self) -> None:
        """Read the weights that the run begins with; those of the checkpoint that it resumes from, its stage reads."""
        plan, groups = self.plan, self.groups
        if groups.rank == 0:
            self.sources = run_sources(plan).with_data(data_record(self.store))
        if plan.resume is None and plan.start is not None:
            load_checkpoint(plan.start[1], self.model, groups, None, 0)
        elif plan.resume is None:
            load_hf_weights(self.model, plan.config.folders, groups)

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
        result = evaluate(self.engine, self.store, self.shard, self.plan.config.evaluation)
        for class_name, losses in result.loss.items():
            for model in sorted(losses, key="fused".__eq__):  # a specialist first: the fused model inherits its NaN
                if not math.isfinite(losses[model]):
                    advice = remedy(self.checkpoints) if trained else "look at its weights"
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
        batches = TrainingBatches(self.store, stage.samples_per_class, config.seed + number, self.shard)
        trainable = self.make_trainable(number)
        if self.plan.resume is not None and self.plan.resume[0] == begin:
            load_checkpoint(self.plan.resume[1], self.model, self.groups, trainable, done, begin.skipped)
        first = self.global_step(Progress(number, 0))
        if done and self._evaluation_due(number, done):  # of the step resumed from: the run may have ended before it
            report.evaluated(self.evaluate(), number, first + done)
        report.begin_stage(number, STAGE_TITLES[number], first + 1, stage.steps)
        if done == stage.steps:
            return None
        judge, overdue = Judge(self._measured_loss(batches)), False
        skips = Skips(config.faults.skips, begin.skipped)
        begun = time.perf_counter()
        with self.stopping.listening(), StepsAhead(batches, done, stage.steps, self.device) as ahead:
            for step in range(done, stage.steps):
                record, stop = self.step(number, trainable, ahead, step, begun)
                # What follows belongs to the next step, but for checkpoints and evaluations.
                begun = time.perf_counter()
                report.step(record)
                skips.count(record.skipped)
                progress = Progress(number, step + 1, skips.total)
                if record.skipped:
                    report.note(f"{self.place(progress)}: {_not_finite(record)}; skipped")
                    if self.groups.rank == 0:
                        write_down(config.run_dir, record, batches.sampler.batch(step))
                if skips.too_many:
                    return self._roll_back(f"{self.place(progress)}: {_not_finite(record)}")
                is_last = stop is not None or step + 1 == stage.steps
                if is_last or overdue or _due(step + 1, config.checkpoint.every):
                    problem = self._publish(progress, trainable, judge, self._measured_loss(batches), report)
                    if problem and is_last:
                        raise DivergedError(f"{problem}; {remedy(self.checkpoints)}")
                    if problem and not overdue:
                        report.note(f"{problem}; no checkpoint until that has passed")
                    overdue = problem is not None
                    begun = time.perf_counter()
                if stop is not None:
                    return replace(stop, why=f"{stop.why} behind {self.place(progress)}; --resume goes on from there")
                if self._evaluation_due(number, step + 1):
                    report.evaluated(self.evaluate(), number, first + step + 1)
                    begun = time.perf_counter()
        return None

    def _roll_back(self, problem: str) -> RollBack:
        """To the newest checkpoint, which rank 0 chooses; DivergedError where there is none, or it did not help."""
        found = [list_checkpoints(self.checkpoints)[-1:]]
        dist.broadcast_object_list(found, src=0)
        if not found[0] or found[0][0][1] == self._went_back_to:
            again = " again" if found[0] else ""
            raise DivergedError(f"{problem}{again}; {remedy(self.checkpoints)}")
        self._went_back_to = found[0][0][1]
        return RollBack(read_progress(self._went_back_to, self.plan.identity), self._went_back_to)

    def _measured_loss(self, batches: TrainingBatches) -> float:
        return measured_loss(self.engine, self.store.class_names, batches.step(0).microbatches)

    def _evaluation_due(self, number: int, step: int) -> bool:
        """After this step of the stage; the end of stage 2 is evaluated by ``run``."""
        if step == self.stage(number).steps:
            return number == 1
        return _due(step, self.plan.config.evaluation.every)

    def make_trainable(self, number: int) -> Trainable:
        """What the stage trains: in stage 1 the gate on last stages and nothing elsewhere, in stage 2 everything."""
        gc.collect()  # the last stage's optimizer and gradient buffers, which hold each other
        config = self.plan.config
        self.model.requires_grad_(number == 2)
        module: nn.Module = self.model
        if number == 1:
            module = self.model.fusion.gate if self.model.fusion is not None else nn.Module()
            module.requires_grad_(True)
        return make_trainable(
            module,
            self.model.config,
            self.groups.megatron,
            self.stage(number),
            config.optimizer,
            distributed_optimizer=config.parallel.distributed_optimizer and number == 2,
            overlap_gradients=number == 2,
            device=self.device,
        )

    def step(
        self, number: int, trainable: Trainable, batches: Steps, step: int, begun: float
    ) -> tuple[StepRecord, Stop | None]:
        """Step ``step`` (from 0) of a stage, which began at ``begun`` by ``time.perf_counter``.

        Nothing is updated where the loss or a gradient is not finite. Returns why the run is to stop, too.
        """
        asked = time.perf_counter()
        batch = batches.step(step)
        data_seconds = time.perf_counter() - asked
        progress, config = Progress(number, step + 1), self.plan.config
        specialists = list(config.specialists)
        gates = {name: f"gate {name}" for name in specialists}
        totals = ClassTotals(self.store.class_names, ["loss", *gates.values()], self.device)
        terms = batch.response_tokens if config.loss.normalize == "token" else batch.samples

        def loss_of(hidden: dict[str, Tensor], microbatch: MicroBatch) -> Tensor:
            fusion, exchange = self.model.fusion, self.model.exchange
            assert fusion is not None and exchange is not None
            with torch.enable_grad():
                loss, rows, weights = fusion.loss(exchange(hidden), microbatch.targets)
                loss = loss / terms
            if number == 1:
                loss.backward()
            totals.add(microbatch.row_class, torch.cat([rows[:, None].to(weights.dtype), weights], dim=1))
            return loss

        trainable.zero_grad()
        if number == 1:
            self.engine.forward(batch.microbatches, loss_of)
            trainable.reduce_gradients()
        else:
            self.engine.train(trainable.wrapped, batch.microbatches, loss_of)
        norm = trainable.clip_gradients().double()
        own = [data_seconds, float(peak_memory(self.device)), self.stopping.wanted]
        costs = to_device(torch.tensor(own, dtype=torch.float64), self.device)
        # A maximum may lose a nan: whether there was one is a number of its own.
        reduced = totals.reduce(self.groups, torch.cat([norm[None], (~norm.isfinite()).double()[None], costs]))
        means, (grad_norm, broken, worst_data, worst_memory, wanted) = reduced.means, reduced.largest
        loss = sum(means[name]["loss"] * reduced.counts[name] for name in means) / terms
        skipped = bool(broken) or not math.isfinite(loss)
        lr = trainable.update(skip=skipped)
        seconds = time.perf_counter() - begun
        record = StepRecord(
            stage=number,
            step=self.global_step(progress),
            loss=loss,
            class_loss={name: row["loss"] for name, row in means.items()},
            lr=lr,
            grad_norm=grad_norm,
            tokens=batch.response_tokens,
            tokens_per_s=batch.response_tokens / seconds,
            gate={name: {other: row[gates[other]] for other in specialists} for name, row in means.items()},
            seconds=seconds,
            processed_tokens=batch.processed_tokens,
            padding=batch.packing.padding,
            imbalance=batch.packing.imbalance,
            fill=batch.packing.fill,
            data_seconds=worst_data,
            peak_memory_bytes=int(worst_memory),
            skipped=skipped,
        )
        return record, self.stopping.agreed(wanted)

    def _publish(
        self, progress: Progress, trainable: Trainable, judge: Judge, loss: float, report: RunReport
    ) -> str | None:
        """Write a checkpoint, unless the weights are ruined: then say so.

        Args:
            loss: of the weights as they are, measured.
        """
        where = self.place(progress)
        if progress.step == progress.skipped:
            return f"{where}: nothing has been updated yet"
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise DivergedError(f"{where}: weights are not finite; {remedy(self.checkpoints)}")
        if not judge.accepts(loss):
            return (
                f"{where}: ruined weights: their loss on the stage's first batch is {loss:.4g}, "
                f"more than {ALLOWANCE:.2g} above the {judge.lowest:.4g} that it was"
            )
        path = save_checkpoint(
            self.checkpoints,
            progress,
            self.model,
            trainable,
            self.groups,
            self.plan.identity,
            self.plan.config.checkpoint.keep,
            self.sources,
        )
        report.note(f"checkpoint {path}")
        return None


def run_sources(plan: RunPlan) -> SourceFiles:
    """What the run's checkpoints keep of its specialists: from where their weights come from."""
    if plan.start is None:
        return Sources.of(plan.config).read(plan.resume[1] if plan.resume else None)
    if plan.resume is not None:
        return SourceFiles.of_checkpoint(plan.resume[1], plan.config, trained=None)
    return SourceFiles.of_checkpoint(plan.start[1], plan.config, trained=plan.start[0].trained)


def build_model(plan: RunPlan, groups: RankGroups, device: torch.device) -> FusedStage:
    """This rank's share of the fused model of ``plan``, weights not loaded."""
    config = plan.config
    with megatron_scope(device):
        return build_fused_stage(
            groups,
            plan.architectures,
            vocab_size=plan.vocab_size,
            gate_units=plan.gate_units,
            dtype=DTYPES[config.dtype],
            device=device,
            sequence_parallel=config.parallel.sequence_parallel,
            loss=LossOptions(config.loss.backend, config.loss.label_smoothing, config.loss.z_loss),
            seed=config.seed,
            recompute_layers=config.parallel.recompute_layers,
        )


def make_shard(plan: RunPlan, groups: RankGroups, pad_id: int | None = None) -> Shard:
    """This rank's part of the data-parallel work; ``pad_id`` None: the first specialist's EOS, from its tokenizer."""
    config, placements = plan.config, plan.layout.placements
    sequence_parallel = config.parallel.sequence_parallel
    return Shard(
        dp_rank=groups.replica_index,
        dp_size=plan.layout.dp,
        microbatch_tokens=config.microbatch_tokens,
        specialists=tuple(groups.local_specialists),
        multiples={name: placement.tp if sequence_parallel else 1 for name, placement in placements.items()},
        pad_id=TextEncoder(next(iter(config.folders.values()))).eos_id if pad_id is None else pad_id,
    )


def _not_finite(record: StepRecord) -> str:
    return f"loss is {record.loss:.6g}, gradient norm {record.grad_norm:.6g}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
