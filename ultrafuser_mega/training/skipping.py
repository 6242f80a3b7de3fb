"""Steps whose loss or gradient is not finite: skipped, counted and written down; too many in a row send the run back.

Such a step leaves weights and optimizer as they were. It counts as a step: the schedule goes on, its samples are not
asked for again. AdamW's own count, which only updates advance, is a step behind from then on (``Progress.skipped``).

Behind ``faults.skips`` of them in a row it is no longer the data of one step. Then the run goes back to its newest
checkpoint, as --resume would: what a defective device did is undone. What comes again behind the same checkpoint will
come every time, and ends the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.data.sampler import Pick
from ultrafuser_mega.reporting.records import StepRecord

SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class RollBack:
    """Go on from the checkpoint at ``path``, which stands at ``progress``."""

    progress: Progress
    path: Path

    @property
    def why(self) -> str:
        """For people."""
        return f"going back to {self.path}"


class Skips:
    """Those of a stage.

    Args:
        limit: in a row, from which on the run goes back.
        done: of the stage, by an earlier part of the run.
    """

    def __init__(self, limit: int, done: int) -> None:
        self.limit, self.total, self.in_a_row = limit, done, 0

    def count(self, skipped: bool) -> None:
        """Behind every step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    @property
    def too_many(self) -> bool:
        """Whether the run has to go back."""
        return self.in_a_row >= self.limit


def write_down(run_dir: Path, record: StepRecord, samples: Sequence[Pick]) -> None:
    """Append a line to ``skipped.jsonl``: step, loss, gradient norm, and the samples as class and row of its store."""
    line = {
        "stage": record.stage,
        "step": record.step,
        "loss": str(record.loss),  # JSON has no nan
        "grad_norm": str(record.grad_norm),
        "samples": [list(pick) for pick in samples],
    }
    with (run_dir / SKIPPED_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")
