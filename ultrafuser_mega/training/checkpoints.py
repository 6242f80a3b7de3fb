"""A run's checkpoints: which weights become one, what people are told of it, and the way back to the newest."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints, read_progress
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.left_out import changing, is_kept, record_of
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.resume import data_record
from ultrafuser_mega.checkpoint.saver import Saver
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.store_watch import StoreWatch
from ultrafuser_mega.errors import DivergedError, InputError
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.trainable import Trainable
from ultrafuser_mega.training.assembly import run_sources
from ultrafuser_mega.training.divergence import ALLOWANCE, Judge, remedy
from ultrafuser_mega.training.skipping import RollBack
from ultrafuser_mega.training.stopping import Stopping


class RunCheckpoints:
    """Those of one run; building it is collective over the job.

    Args:
        plan: of the run.
        model: whose weights are kept.
        groups: this rank's process groups.
        store: the run's token store; what becomes of its files is noted with every checkpoint.
        stopping: learns how long writing takes.
    """

    def __init__(
        self, plan: RunPlan, model: FusedStage, groups: RankGroups, store: TokenStore, stopping: Stopping
    ) -> None:
        config = plan.config
        self._identity, self._model, self._groups, self._stopping = plan.identity, model, groups, stopping
        self._folder = config.run_dir / "checkpoints"
        # Parts whose weights they hold; None: all.
        self._parts = changing(config) if config.checkpoint.weights == "trained" else None
        sources = run_sources(plan).with_data(data_record(store)) if groups.rank == 0 else None
        if sources is not None and self._parts is not None:
            sources = sources.with_left_out(record_of(config))
        self._saver = Saver(self._folder, config.checkpoint.keep, config.checkpoint.keep_every, plan.identity, sources)
        self._watch = StoreWatch(store)
        self._went_back_to: Path | None = None
        self._told_bound = False

    def publish(
        self,
        progress: Progress,
        where: str,
        trainable: Trainable,
        judge: Judge,
        loss: float,
        report: RunReport,
        best: bool,
    ) -> str | None:
        """Begin to write one, unless the weights are ruined: then say so; collective.

        Args:
            progress: what has been done.
            where: the same for people.
            trainable: of the stage.
            judge: of the stage's weights.
            loss: of the weights as they are, measured.
            report: of the run.
            best: it has the stage's lowest held-out loss so far.

        Raises:
            DivergedError: a weight is not finite.
        """
        trainable.settle()
        if progress.step == progress.skipped:
            return f"{where}: nothing has been updated yet"
        finite = torch.stack([p.isfinite().all() for p in self._model.parameters()]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise DivergedError(f"{where}: weights are not finite; {self.remedy()}")
        if not judge.accepts(loss):
            return (
                f"{where}: ruined weights: their loss on the stage's first samples is {loss:.4g}, "
                f"more than {ALLOWANCE:.2g} above the {judge.lowest:.4g} that it was"
            )
        if line := self._watch.look():
            report.note(line)
        chunks, parts = chunks_to_write(self._model, trainable, self._groups), self._parts
        self._saver.save(progress, [chunk for chunk in chunks if parts is None or is_kept(chunk.key, parts)], best=best)
        return None

    def is_best(self, progress: Progress) -> None:
        """The checkpoint that is there has the stage's lowest held-out loss so far."""
        self._saver.is_best(progress)

    def tell(self, report: RunReport) -> None:
        """What has been written since the last time."""
        for line in self._saver.news():
            report.note(line)
        if self._saver.seconds:
            self._stopping.took("checkpoint", self._saver.seconds)
            if not self._told_bound:
                self._told_bound = True
                report.note(self._stopping.bound)

    def settle(self, report: RunReport, *, must: bool) -> None:
        """Wait for the one that is being written; InputError where it cannot be but ``must``."""
        problem = self._saver.wait()
        if problem is not None and must:
            raise InputError(problem)
        self.tell(report)

    def roll_back(self, problem: str) -> RollBack:
        """To the newest one, which rank 0 chooses; DivergedError where there is none, or it did not help."""
        self._saver.wait()  # what is being written is the newest then
        found = [list_checkpoints(self._folder)[-1:]]
        dist.broadcast_object_list(found, src=0)
        if not found[0] or found[0][0][1] == self._went_back_to:
            again = " again" if found[0] else ""
            raise DivergedError(f"{problem}{again}; {self.remedy()}")
        self._went_back_to = found[0][0][1]
        return RollBack(read_progress(self._went_back_to, self._identity), self._went_back_to)

    def remedy(self) -> str:
        """What to do about divergence; ends a message."""
        self._saver.wait()  # what is being written is good, and the newest then
        return remedy(self._folder)
