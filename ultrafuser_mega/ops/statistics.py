"""The softmax of one row as four numbers, and everything that follows from them: loss and logit gradient.

A row's statistics over a set of vocabulary columns are
    m = max_v z_v,   s = sum_v exp(z_v - m),   t = z_y - m,   q = sum_v (z_v - m),
all but the first relative to the maximum, so that a large common offset of the logits costs no precision. The set may
be one rank's shard (t = -inf where y lies elsewhere; m = -inf, s = 0 for a shard without real rows) or the vocabulary.

With lse = m + log s, eps = label_smoothing, lam = z_loss, u = the row's weight and V = vocab_size, loss.py's loss is
    loss    = log s - (1 - eps) t - eps q / V + lam lse^2
    dz_v    = a exp(z_v - m) - b [v = y] - c,     a = u (1 + 2 lam lse) / s,  b = u (1 - eps),  c = u eps / V

For a gate that trains alone, three more numbers per specialist, with d_j = o_j - z the deviation of its logits o_j:
    A_j = sum_v exp(z_v - m) d_jv,      T_j = d_jy (0 where y lies elsewhere),      Q_j = sum_v d_jv
    da_j = w_j (a A_j - b T_j - c Q_j)
since dw_j - sum_k w_k dw_k = sum_v dz_v (o_jv - z_v). What all o_j have in common cancels before anything is summed.
The specialist with the largest weight gets what makes the sum over j zero, as it is: where its weight is next to 1 its
own d_j is smaller than the rounding of the logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops.problem import Settings, check_shards, readable

MAX, SUM_EXP, TARGET, SHIFTED_SUM = range(4)
COLUMNS = 4


def combine(shards: Tensor, columns: Tensor) -> Tensor:
    """Statistics of the whole vocabulary from those of its shards, by rescaling to the common maximum.

    Args:
        shards: (S, C, 4 + 3 n) statistics of S shards; n = 0 without those of the specialists.
        columns: (S, 1) how many real columns each shard has.

    Returns:
        (C, 4 + 3 n). The sums run in shard order, so every rank computes the same bits.
    """
    top = shards[:, :, MAX].amax(0)  # (C,)
    shift = shards[:, :, MAX] - top  # (S, C), -inf for a shard without columns
    scale = shift.exp()
    sum_exp = (shards[:, :, SUM_EXP] * scale).sum(0)
    target = (shards[:, :, TARGET] + shift).amax(0)
    shifted_sum = torch.where(columns > 0, shards[:, :, SHIFTED_SUM] + columns * shift, 0.0).sum(0)
    n = (shards.shape[2] - COLUMNS) // 3
    expectation = (shards[:, :, COLUMNS : COLUMNS + n] * scale[:, :, None]).sum(0)
    return torch.cat(
        (torch.stack((top, sum_exp, target, shifted_sum), dim=1), expectation, shards[:, :, COLUMNS + n :].sum(0)),
        dim=1,
    )


class PendingStatistics:
    """This shard's statistics on their way to every rank of the group, in ONE collective of 20 + 12 n bytes per row."""

    def __init__(self, local: Tensor, real_rows: int, settings: Settings) -> None:  # local (C, 4 + 3 n)
        self._local = local
        self._vocab_size = settings.vocab_size
        self._work: dist.Work | None = None
        if settings.group is not None:
            columns = local.new_full((local.shape[0], 1), real_rows)
            payload = torch.cat((local, columns), dim=1)  # (C, 5 + 3 n)
            self._gathered = payload.new_empty((settings.shards, *payload.shape))
            # into one tensor: NCCL gathers a list into a tensor of its own first and copies from there
            self._work = dist.all_gather_into_tensor(
                self._gathered.flatten(0, 1), payload, group=settings.group, async_op=True
            )

    def wait(self) -> Tensor:  # (C, 4 + 3 n)
        """Statistics of the whole vocabulary, as often as asked for. On a GPU the stream waits, not the host.

        Raises:
            InputError: the shards overlap or leave gaps, as far as their sizes show it. On the CPU, on every rank; on a
                GPU looking would stall the device.
        """
        if self._work is None:
            return self._local
        self._work.wait()
        self._work = None
        columns = self._gathered[:, :1, -1]  # (S, 1), (S, 0) without rows
        if columns.numel() and readable(columns):
            check_shards(int(columns.sum()), self._vocab_size)
        self._local = combine(self._gathered[:, :, :-1], columns)
        del self._gathered
        return self._local


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


def gate_gradient(statistics: Tensor, gate_weights: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """da (N, n) from statistics (N, 4 + 3 n) of the whole vocabulary, w (N, n) and the rows' weights (N,)."""
    a, b, c = (coefficient[:, None] for coefficient in dlogit_coefficients(statistics, weight, settings))
    expectation, at_target, total = statistics[:, COLUMNS:].chunk(3, dim=1)  # each (N, n)
    terms = torch.where(weight[:, None] == 0, 0.0, gate_weights * (a * expectation - b * at_target - c * total))
    leader = gate_weights.argmax(dim=1, keepdim=True)
    others = terms.scatter(1, leader, 0.0)
    return others.scatter(1, leader, -others.sum(dim=1, keepdim=True))
