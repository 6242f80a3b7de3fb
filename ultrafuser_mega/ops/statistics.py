"""The softmax of one row as four numbers, and everything that follows from them: loss and logit gradient.

A row's statistics over a set of vocabulary columns are
    m = max_v z_v,   s = sum_v exp(z_v - m),   t = z_y - m,   q = sum_v (z_v - m),
all but the first relative to the maximum, so that a large common offset of the logits costs no precision. The set may
be one rank's shard (t = -inf where y lies elsewhere; m = -inf, s = 0 for a shard without real rows) or the vocabulary.

With lse = m + log s, eps = label_smoothing, lam = z_loss, u = the row's weight and V = vocab_size (DESIGN of the loss):
    loss    = log s - (1 - eps) t - eps q / V + lam lse^2
    dz_v    = a exp(z_v - m) - b [v = y] - c,     a = u (1 + 2 lam lse) / s,  b = u (1 - eps),  c = u eps / V
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops.problem import Settings

MAX, SUM_EXP, TARGET, SHIFTED_SUM = range(4)
COLUMNS = 4


def combine(shards: Tensor, columns: Tensor) -> Tensor:
    """Statistics of the whole vocabulary from those of its shards, by rescaling to the common maximum.

    Args:
        shards: (S, C, 4) statistics of S shards.
        columns: (S, 1) how many real columns each shard has.

    Returns:
        (C, 4). The sums run in shard order, so every rank computes the same bits.
    """
    top = shards[:, :, MAX].amax(0)  # (C,)
    shift = shards[:, :, MAX] - top  # (S, C), -inf for a shard without columns
    sum_exp = (shards[:, :, SUM_EXP] * shift.exp()).sum(0)
    target = (shards[:, :, TARGET] + shift).amax(0)
    shifted_sum = torch.where(columns > 0, shards[:, :, SHIFTED_SUM] + columns * shift, 0.0).sum(0)
    return torch.stack((top, sum_exp, target, shifted_sum), dim=1)


class PendingStatistics:
    """This shard's statistics on their way to every rank of the group, in ONE collective of 20 bytes per row."""

    def __init__(self, local: Tensor, real_rows: int, settings: Settings) -> None:  # local (C, 4)
        self._local = local
        self._work: dist.Work | None = None
        if settings.group is not None:
            columns = local.new_full((local.shape[0], 1), real_rows)
            payload = torch.cat((local, columns), dim=1)  # (C, 5)
            self._gathered = payload.new_empty((settings.shards, *payload.shape))
            self._work = dist.all_gather(list(self._gathered), payload, group=settings.group, async_op=True)

    def wait(self) -> Tensor:  # (C, 4)
        """Statistics of the whole vocabulary. On a GPU the stream waits, not the host."""
        if self._work is None:
            return self._local
        self._work.wait()
        return combine(self._gathered[:, :, :COLUMNS], self._gathered[:, :1, COLUMNS])


def row_loss(statistics: Tensor, kept: Tensor, settings: Settings) -> Tensor:
    """Loss of every row, 0 where it is ignored. statistics (N, 4), kept (N,) -> (N,)."""
    log_sum = statistics[:, SUM_EXP].log()
    loss = log_sum - (1.0 - settings.label_smoothing) * statistics[:, TARGET]
    if settings.label_smoothing:
        loss = loss - settings.label_smoothing * statistics[:, SHIFTED_SUM] / settings.vocab_size
    if settings.z_loss:
        loss = loss + settings.z_loss * (statistics[:, MAX] + log_sum).square()
    return torch.where(kept, loss, 0.0)


def dlogit_coefficients(statistics: Tensor, weight: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c), each (N,), of the logit gradient above. weight (N,): u, exactly 0 on ignored rows.

    All three are 0 where the weight is, whatever the statistics of such a row are.
    """
    lse_term = 1.0 + 2.0 * settings.z_loss * (statistics[:, MAX] + statistics[:, SUM_EXP].log())
    a = torch.where(weight == 0, 0.0, weight * lse_term / statistics[:, SUM_EXP])
    return a, weight * (1.0 - settings.label_smoothing), weight * (settings.label_smoothing / settings.vocab_size)
