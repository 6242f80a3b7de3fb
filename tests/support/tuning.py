"""The loss of plain further tuning, for runs of ``baselines.tuning``."""

from __future__ import annotations

from ultrafuser_mega.baselines.heldout import Model, response_logits
from ultrafuser_mega.baselines.tuning import LossOf, MicroLoss, Tuning, row_losses
from ultrafuser_mega.data.collate import MicroBatch


def plain_loss(run: Tuning) -> LossOf:
    """Cross-entropy of the response tokens, asked in the model's own form."""

    def loss_of(model: Model, batch: MicroBatch) -> MicroLoss:
        found = response_logits(model, batch, run.forms[0], run.store.vocab_size).logits[0]
        return MicroLoss(row_losses(found.float(), batch.targets, run.config.loss))

    return loss_of
