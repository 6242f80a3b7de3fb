"""Which weights may become a checkpoint: none that an update ruined may push a good one out.

A step's loss is that of the weights before its update and says nothing of those that a checkpoint would hold. So these
are measured themselves, by the training loss per response token on the stage's first global batches. They stay the
same, so the weights alone move their loss; and it is what training lowers (with label smoothing and z-loss), so nothing
but damage raises it by much. That holds of enough tokens: a response of one word may well lose two nats while the
model learns. So small batches are joined until they hold 64 samples, and every token counts alike, whatever its class.

Weights are ruined where it is more than ln 2 above the lowest that any checkpoint of the stage had, or the weights the
stage began or was resumed with. ln 2 is one bit: a token then has less than half of its probability (geometric mean).
So no published checkpoint is ever much worse than one that it pushes out. How high the loss is does not matter:
specialists that are sure of themselves on foreign data begin far above ln(vocab_size), and that is no divergence.

A spike that passes delays the checkpoint by as many steps and does no more. Where the stage or the time ends in one the
run ends with DivergedError; so it does at once where a loss, a gradient or a weight is not finite, which cannot pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.data.batches import Steps
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.training.engine import Engine
from ultrafuser_mega.training.totals import ClassTotals

ALLOWANCE = math.log(2.0)  # nats per token
SAMPLES = 64  # at least, of a longer stage


class Judge:
    """Compares measured losses with the lowest there was.

    Args:
        loss: of the weights that the stage begins or goes on with.
    """

    def __init__(self, loss: float) -> None:
        self.lowest = loss

    def accepts(self, loss: float) -> bool:
        """Whether weights of this loss may be published; then they count as those that were."""
        if not loss <= self.lowest + ALLOWANCE:  # nor is nan
            return False
        self.lowest = min(self.lowest, loss)
        return True


def measured_batches(batches: Steps, steps: int) -> list[MicroBatch]:
    """This rank's microbatches of the first steps of a stage of ``steps`` that together hold ``SAMPLES`` samples."""
    found, samples = list[MicroBatch](), 0
    for step in range(steps):
        batch = batches.step(step)
        found += batch.microbatches
        samples += batch.samples
        if samples >= SAMPLES:
            break
    return found


def measured_loss(engine: Engine, class_names: Sequence[str], microbatches: list[MicroBatch]) -> float:
    """Training loss per response token of the weights as they are; collective over the job."""
    totals = ClassTotals(class_names, ["loss"], engine.device)

    def measure(hidden: dict[str, Tensor], batch: MicroBatch) -> Tensor:
        fusion, exchange = engine.model.fusion, engine.model.exchange
        assert fusion is not None and exchange is not None
        with torch.no_grad():
            loss, rows, _ = fusion.loss(exchange(hidden), batch.targets)
        totals.add(batch.row_class, rows[:, None])
        return loss

    engine.forward(microbatches, measure)
    found = totals.reduce(engine.groups)
    return math.fsum(row["loss"] * found.counts[name] for name, row in found.means.items()) / sum(found.counts.values())


def remedy(checkpoints: Path) -> str:
    """What to do about divergence, by the checkpoints there are; ends a message."""
    found = list_checkpoints(checkpoints)
    if not found:
        return "no checkpoint was written before it: start afresh with a smaller lr"
    return f"the last good checkpoint is {found[-1][1].name}: --resume goes on from it, with a smaller lr"
