"""A stage of a run, from where it begins to its end: its steps, and the evaluations and checkpoints on the way.

A checkpoint is written before the evaluation of the same step, so that a run that is killed in between has lost
nothing; but where the lowest held-out loss decides something, it is known first.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import in_words
from ultrafuser_mega.data.steps_ahead import StepsAhead
from ultrafuser_mega.errors import DivergedError
from ultrafuser_mega.planning.trained import part_shares
from ultrafuser_mega.reporting.parts_table import as_text, parts_table
from ultrafuser_mega.reporting.records import EvaluationResult, StepRecord
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.training.assembly import read_resumed
from ultrafuser_mega.training.best import Best, mean_loss
from ultrafuser_mega.training.divergence import Judge, measured_batches, measured_loss
from ultrafuser_mega.training.lessons import begin_with, lessons_of
from ultrafuser_mega.training.skipping import RollBack, Skips, write_down
from ultrafuser_mega.training.stopping import Stop
from ultrafuser_mega.training.trainer import Trainer


def train_stage(trainer: Trainer, begin: Progress, report: RunReport) -> Stop | RollBack | None:
    """The stage of ``begin``, from there to its end; collective over the job.

    Returns why it ends before: behind a checkpoint, after which an evaluation may be due, or in order to go back to
    one. None: the stage is over.

    Raises:
        DivergedError: the numbers are no longer finite, or the stage or the time ends with ruined weights.
    """
    stage = _Stage(trainer, begin, report)
    return None if stage.is_over else stage.train()


class _Stage:
    """See :func:`train_stage`; building one makes the optimizer, reads what is resumed and tells what trains."""

    def __init__(self, trainer: Trainer, begin: Progress, report: RunReport) -> None:
        self.trainer, self.begin, self.report = trainer, begin, report
        self.config, self.number, self.stage = trainer.plan.config, begin.stage, trainer.stage(begin.stage)
        self.batches, self.trainable = trainer.batches(self.number), trainer.make_trainable(self.number)
        plan = trainer.plan
        if plan.resume is not None and plan.resume[0] == begin:
            read_resumed(plan, trainer.model, trainer.groups, self.trainable)
        self.first = trainer.global_step(Progress(self.number, 0))
        if begin.step and self._evaluation_due(begin.step):  # the run may have ended before it
            self._evaluate_again()
        report.note(as_text(parts_table(f"stage {self.number} trains", part_shares(plan, self.number))))
        report.begin_stage(self.number, in_words(self.config.parts(self.number)), self.first + 1, self.stage.steps)
        self.best = self._best_until(begin.step)
        self.owed = self.told = False  # a checkpoint that was due and could not be; people have been told
        self.clock = 0.0  # since when time belongs to the next step

    @property
    def watched(self) -> bool:
        """Whether the lowest held-out loss decides anything."""
        return self.config.checkpoint.keep_best or self.config.evaluation.patience is not None

    @property
    def has_seen_its_best(self) -> bool:
        """Whether ``evaluation.patience`` is at its end."""
        return self.best.since >= (self.config.evaluation.patience or math.inf)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do where it begins."""
        return self.begin.step == self.stage.steps or self.has_seen_its_best

    def train(self) -> Stop | RollBack | None:
        """See :func:`train_stage`."""
        trainer, report = self.trainer, self.report
        judge = Judge(self._measured_loss())
        skips = Skips(self.config.faults.skips, self.begin.skipped)
        self.clock = time.perf_counter()
        trainer.phases.restart()  # what came before belongs to no step
        lessons = lessons_of(
            trainer.plan,
            trainer.groups,
            self.batches,
            trainer.model,
            self.trainable,
            trainer.device,
            trainer.answering,
            trainer.phases,
        )
        given, waits = (self.batches, None) if lessons is None else (lessons, lessons.waits)
        steps = StepsAhead(given, self.begin.step, self.stage.steps, trainer.device, waits)
        with trainer.watching(), steps as ahead:
            for step in range(self.begin.step, self.stage.steps):
                if lessons is not None:
                    lessons.begin(step)
                with trainer.profiler.step(self.first + step + 1):
                    record, stop = trainer.step(self.number, self.trainable, ahead, step, self.clock)
                # What follows belongs to the next step, but for checkpoints and evaluations.
                self.clock = time.perf_counter()
                self._tell(record)
                skips.count(record.skipped)
                progress = Progress(self.number, step + 1, skips.total)
                where = trainer.place(progress)
                if record.skipped:
                    report.note(f"{where}: {_not_finite(record)}; skipped")
                    if trainer.groups.rank == 0:
                        write_down(self.config.run_dir, record, (lessons or self.batches.sampler).batch(step))
                if skips.too_many:
                    return trainer.saved.roll_back(f"{where}: {_not_finite(record)}")

                evaluated, lowest = None, False
                if (
                    self.watched
                    and stop is None
                    and not record.skipped
                    and self._evaluation_due(step + 1, self.watched)
                ):
                    evaluated = self._evaluate()
                    lowest = self.best.take(mean_loss(evaluated))
                is_last = stop is not None or self.has_seen_its_best or step + 1 == self.stage.steps
                self._save_if_due(progress, judge, record.skipped, is_last, lowest)
                if stop is not None:
                    trainer.saved.settle(report, must=True)
                    return replace(stop, why=f"{stop.why} behind {where}; --resume goes on from there")
                if evaluated is None and self._evaluation_due(step + 1):
                    evaluated = self._evaluate()
                if evaluated is not None and not (self.number == 2 and is_last):  # which run evaluates for its tables
                    report.evaluated(evaluated, self.number, self.first + step + 1)
                if self.has_seen_its_best:
                    report.note(
                        f"{where}: the stage ends: {self.best.since} evaluations without a lower mean held-out loss "
                        f"than {self.best.lowest:.4f}"
                    )
                    break
            trainer.saved.settle(report, must=self.number == list(self.config.stages)[-1])
        return None

    def _tell(self, record: StepRecord) -> None:
        self.report.step(record)
        self.trainer.saved.tell(self.report)
        for line in filter(None, (self.trainer.measures.straggler, self.trainer.profiler.written(record.step))):
            self.report.note(line)

    def _save_if_due(self, progress: Progress, judge: Judge, skipped: bool, is_last: bool, lowest: bool) -> None:
        """Or if it was, and could not be written; DivergedError where the stage's last one cannot be."""
        is_best = lowest and self.config.checkpoint.keep_best
        self.owed |= is_best or _due(progress.step, self.config.checkpoint.every)
        # Not in the midst of skipped steps, which the run might go back into.
        if not (is_last or (self.owed and not skipped)):
            return
        trainer, where = self.trainer, self.trainer.place(progress)
        with trainer.phases("save", whole=True):
            loss = self._measured_loss()
            problem = trainer.saved.publish(progress, where, self.trainable, judge, loss, self.report, is_best)
        if problem and is_last:
            raise DivergedError(f"{problem}; {trainer.saved.remedy()}")
        if problem and not self.told:
            self.report.note(f"{problem}; no checkpoint until that has passed")
        self.owed = self.told = problem is not None
        self.clock = time.perf_counter()

    def _evaluate(self) -> EvaluationResult:
        result = self.trainer.evaluate()
        self.clock = time.perf_counter()
        return result

    def _evaluate_again(self) -> None:
        """The step that the run goes on from."""
        result, before = self.trainer.evaluate(), self._best_until(self.begin.step - 1)
        if before.take(mean_loss(result)) and self.config.checkpoint.keep_best:
            self.trainer.saved.is_best(self.begin)
        self.report.evaluated(result, self.number, self.first + self.begin.step)

    def _best_until(self, step: int) -> Best:
        return Best.of_run(self.config.run_dir, self.number, self.first, self.first + step)

    def _measured_loss(self) -> float:
        trainer = self.trainer
        begin_with(self.config, trainer.model)
        first = measured_batches(self.batches, self.stage.steps)
        return measured_loss(trainer.engine, trainer.store.class_names, first)

    def _evaluation_due(self, step: int, at_the_end: bool = False) -> bool:
        """After this step; the end of stage 2 is evaluated by ``run``, if not ``at_the_end`` as well."""
        if step == self.stage.steps:
            return self.number == 1 or at_the_end
        return _due(step, self.config.evaluation.every)


def _not_finite(record: StepRecord) -> str:
    return f"loss is {record.loss:.6g}, gradient norm {record.grad_norm:.6g}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
