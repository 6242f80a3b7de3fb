"""The lowest held-out loss of a stage: which checkpoint is kept for it, and when a stage has seen its best.

It is a function of the evaluations in metrics.jsonl, so a resumed run knows as much as one that was not interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ultrafuser_mega.reporting.records import METRICS_FILE, EvalRecord, EvaluationResult, read_metrics


@dataclass
class Best:
    """See the module.

    lowest  mean over the classes of the fused model's held-out loss, the lowest so far of the stage
    since   evaluations after it
    """

    lowest: float = math.inf
    since: int = 0

    @classmethod
    def of_stage(cls, evals: list[EvalRecord], stage: int, first: int, until: int) -> Best:
        """As it was behind step ``until`` of a stage that begins behind step ``first``, both through both stages."""
        best = cls()
        for record in evals:
            if record.stage == stage and first < record.step <= until:
                best.take(record.mean["fused"])
        return best

    @classmethod
    def of_run(cls, folder: Path, stage: int, first: int, until: int) -> Best:
        """The same on every rank, by what rank 0 finds in the run's ``folder``."""
        found = [cls()]
        if dist.get_rank() == 0 and until > first and (folder / METRICS_FILE).is_file():
            found = [cls.of_stage(read_metrics(folder)[1], stage, first, until)]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def take(self, loss: float) -> bool:
        """The loss of another evaluation; whether it is the lowest."""
        lower = loss < self.lowest
        self.lowest, self.since = (loss, 0) if lower else (self.lowest, self.since + 1)
        return lower


def mean_loss(result: EvaluationResult) -> float:
    """Of the fused model, over classes."""
    return sum(losses["fused"] for losses in result.loss.values()) / len(result.loss)
