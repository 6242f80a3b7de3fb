"""Two softmaxes of one row, teacher's and student's, as eight numbers, and what follows from them: losses and gradient.

With temperature T, p = softmax(z / T) of the teacher's logits z, q = softmax(s / T) of the student's logits s. Over a
set of vocabulary columns, with y = (z - m_t) / T, r = (s - m_s) / T and their difference D = y - r,
    m_t = max_v z_v,        m_s = max_v s_v,
    e_t = sum_v exp(y_v),   e_s = sum_v exp(r_v),
    A = sum_v exp(y_v) D_v,          B = -sum_v exp(r_v) D_v,
    e_1 = sum_v exp(s_v - m_s),      t = s_y - m_s  (-inf where the label lies elsewhere),
all but the maxima relative to them, so that a large common offset of either's logits costs no precision. A set without
columns has maxima of -inf, sums of 0. Then
    KL(p | q) = A / e_t - log e_t + log e_s,        KL(q | p) = B / e_s - log e_s + log e_t,
    CE = log e_1 - t,
    d KL(p | q) / ds = (q - p) / T,                 d KL(q | p) / ds = q (-D - B / e_s) / T,
    d CE / ds = softmax(s) - [v = label].
In the third, log q - log p - KL(q | p) stands for -D - B / e_s: the two sums of exponentials cancel before anything is
rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops.problem import Settings, check_shards, readable

TEACHER_MAX, STUDENT_MAX, TEACHER_SUM, STUDENT_SUM, FORWARD, REVERSE, LABEL_SUM, LABEL = range(8)
COLUMNS = 8


@dataclass(frozen=True)
class Mix:
    """What the loss of a row is made of.

    (1 - labels) T^2 ((1 - reverse) KL(p | q) + reverse KL(q | p)) + labels CE, with T the temperature.
    """

    temperature: float
    reverse: float
    labels: float

    @property
    def divergences(self) -> tuple[float, float]:
        """Factors of KL(p | q) and of KL(q | p)."""
        both = (1.0 - self.labels) * self.temperature**2
        return both * (1.0 - self.reverse), both * self.reverse


def combine(shards: Tensor, temperature: float) -> Tensor:
    """Statistics (C, 8) of the whole vocabulary from those of its S shards, (S, C, 8), by rescaling to the common
    maxima. The sums run in shard order, so every rank computes the same bits."""
    maxima = shards[..., : STUDENT_MAX + 1]  # (S, C, 2)
    top = maxima.amax(0)  # (C, 2)
    shift = (maxima - top) / temperature
    scale = shift.exp()  # 0 for a shard without columns
    teacher, student = scale.unbind(-1)  # (S, C)
    # D of the whole less D of the shard. A shard of nothing adds nothing; its shifts, -inf - -inf, would be NaN.
    apart = torch.where(shift.isfinite().all(-1), shift[..., 0] - shift[..., 1], 0.0)
    label_scale = (maxima - top)[..., 1].exp()
    forward = teacher * (shards[..., FORWARD] + apart * shards[..., TEACHER_SUM])
    reverse = student * (shards[..., REVERSE] - apart * shards[..., STUDENT_SUM])
    label = (shards[..., LABEL] + (maxima - top)[..., 1]).amax(0)
    return torch.stack(
        (
            *top.unbind(-1),
            (teacher * shards[..., TEACHER_SUM]).sum(0),
            (student * shards[..., STUDENT_SUM]).sum(0),
            forward.sum(0),
            reverse.sum(0),
            (label_scale * shards[..., LABEL_SUM]).sum(0),
            label,
        ),
        dim=1,
    )


class PendingStatistics:
    """This shard's statistics on their way to every rank of the group, in ONE collective of 36 bytes per row."""

    def __init__(self, local: Tensor, real_rows: int, settings: Settings, temperature: float) -> None:  # local (C, 8)
        self._local, self._temperature, self._vocab_size = local, temperature, settings.vocab_size
        self._work: dist.Work | None = None
        if settings.group is not None:
            payload = torch.cat((local, local.new_full((local.shape[0], 1), real_rows)), dim=1)  # (C, 9)
            self._gathered = payload.new_empty((settings.shards, *payload.shape))
            self._work = dist.all_gather_into_tensor(
                self._gathered.flatten(0, 1), payload, group=settings.group, async_op=True
            )

    def wait(self) -> Tensor:  # (C, 8)
        """Statistics of the whole vocabulary; raises InputError on the CPU where the shards overlap or leave gaps."""
        if self._work is None:
            return self._local
        self._work.wait()
        self._work = None
        columns = self._gathered[:, :1, -1]
        if columns.numel() and readable(columns):
            check_shards(int(columns.sum()), self._vocab_size)
        self._local = combine(self._gathered[..., :-1], self._temperature)
        del self._gathered
        return self._local


def row_losses(statistics: Tensor, kept: Tensor, mix: Mix) -> Tensor:
    """(3, N): loss, divergence of the teacher alone (by ``reverse``, without T^2) and cross-entropy of every row; 0 on
    ignored ones. statistics (N, 8), kept (N,)."""
    teacher, student = statistics[:, TEACHER_SUM].log(), statistics[:, STUDENT_SUM].log()
    forward = statistics[:, FORWARD] / statistics[:, TEACHER_SUM] - teacher + student
    reverse = statistics[:, REVERSE] / statistics[:, STUDENT_SUM] - student + teacher
    labels = statistics[:, LABEL_SUM].log() - statistics[:, LABEL]
    divergence = forward * (1.0 - mix.reverse) + reverse * mix.reverse
    loss = (1.0 - mix.labels) * mix.temperature**2 * divergence
    if mix.labels:
        loss = loss + mix.labels * labels
    return torch.where(kept, torch.stack((loss, divergence, labels)), 0.0)
