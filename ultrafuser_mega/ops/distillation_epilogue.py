"""The softmax work between the GEMMs of distillation.py, and its form in plain PyTorch: the path of fp64 on a GPU.

    statistics(teacher (C, R), student (C, R), target (C,), mix)  ->  (C, 8), distillation_statistics.py
    dlogits(teacher, student, target, statistics, weight (C,), mix)  ->  (C, R) gradient, in the student's memory

``operand_dtype`` is the type of that gradient and of the other operand of its GEMMs; ``target`` is the local column or
-1, ``statistics`` are those of the whole vocabulary, ``weight`` is 0 on ignored rows. dlogits leaves the teacher's
logits undefined. The plain form is the twin that the compiled ones, distillation_cpu.py and distillation_triton.py,
are tested against.

The plain form takes a few rows at a time, so that what lies between two operations stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ultrafuser_mega.ops.distillation_cpu import CpuEpilogue
from ultrafuser_mega.ops.distillation_statistics import (
    COLUMNS,
    LABEL_SUM,
    REVERSE,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    Mix,
)
from ultrafuser_mega.ops.problem import accumulate_dtype

BLOCK_BYTES = 64 << 20  # of one intermediate of the plain form
FLOOR = -1e30  # of a logit relative to its row's maximum: -inf times a probability of 0 would be NaN


class Epilogue(Protocol):
    operand_dtype: torch.dtype

    def statistics(self, teacher: Tensor, student: Tensor, target: Tensor, mix: Mix) -> Tensor: ...

    def dlogits(
        self, teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, weight: Tensor, mix: Mix
    ) -> Tensor: ...


def epilogue_for(device: torch.device, dtype: torch.dtype) -> Epilogue:
    """The epilogue that serves ``device`` for hidden states and heads of type ``dtype``."""
    if device.type == "cpu":
        return CpuEpilogue(accumulate_dtype(dtype))  # 16-bit operands are upcast there anyway, see gemm.py
    if device.type == "cuda" and dtype != torch.float64:
        from ultrafuser_mega.ops.distillation_triton import TritonEpilogue  # needs triton

        return TritonEpilogue(dtype)
    return TorchEpilogue(accumulate_dtype(dtype))


class TorchEpilogue:
    """Plain PyTorch on any device; logits and gradients of one type."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, teacher: Tensor, student: Tensor, target: Tensor, mix: Mix) -> Tensor:
        out = teacher.new_zeros((teacher.shape[0], COLUMNS))
        out[:, [TEACHER_MAX, STUDENT_MAX, COLUMNS - 1]] = float("-inf")
        if teacher.shape[1] == 0:
            return out
        for rows in _blocks(teacher):
            out[rows] = _statistics(teacher[rows], student[rows], target[rows], mix)
        return out

    def dlogits(
        self, teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, weight: Tensor, mix: Mix
    ) -> Tensor:
        for rows in _blocks(teacher):
            _dlogits(teacher[rows], student[rows], target[rows], statistics[rows], weight[rows, None], mix)
        return student


def _blocks(logits: Tensor) -> Iterator[slice]:
    bytes_per_row = max(1, logits.shape[1] * logits.element_size())
    size = max(1, BLOCK_BYTES // bytes_per_row)
    for start in range(0, logits.shape[0], size):
        yield slice(start, start + size)


def _relative(logits: Tensor, top: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """(z - top) / T. top (C,), -inf for a row that has no finite logit."""
    origin = top.masked_fill(top == float("-inf"), 0.0)[:, None]
    relative = torch.sub(logits, origin, out=out)
    if temperature != 1.0:
        relative.div_(temperature)
    return relative


def _difference(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a - b, finite: -inf stands for FLOOR."""
    return torch.sub(a, b, out=out).nan_to_num_(0.0, -FLOOR, FLOOR)


def _statistics(teacher: Tensor, student: Tensor, target: Tensor, mix: Mix) -> Tensor:
    """(C, 8) of a few rows; what the loss does not ask for is 0."""
    tops = teacher.amax(1), student.amax(1)
    y = _relative(teacher, tops[0], mix.temperature)
    r = _relative(student, tops[1], mix.temperature)
    own = r.exp()
    own_sum = own.sum(1)
    label_sum = own_sum if mix.temperature == 1.0 else (r * mix.temperature).exp_().sum(1)
    label = (r.gather(1, target.clamp(min=0)[:, None]) * mix.temperature).squeeze(1)
    known = y.exp()
    known_sum = known.sum(1)
    apart = _difference(y, r, out=y)
    nothing = torch.zeros_like(own_sum)
    forward = known.mul_(apart).sum(1) if mix.reverse < 1.0 else nothing
    reverse = own.mul_(apart).sum(1).neg_() if mix.reverse > 0.0 else nothing
    label = torch.where(target >= 0, label, float("-inf"))
    return torch.stack((*tops, known_sum, own_sum, forward, reverse, label_sum, label), dim=1)


def _dlogits(teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, weight: Tensor, mix: Mix) -> None:
    """The gradient of a few rows over the student's logits. weight (C, 1)."""
    forward, reverse = (weight * (factor / mix.temperature) for factor in mix.divergences)  # (C, 1) each
    labels = weight * mix.labels
    at = statistics.unsqueeze(-1)  # (C, 8, 1)
    y = _relative(teacher, statistics[:, TEACHER_MAX], mix.temperature, out=teacher)
    r = _relative(student, statistics[:, STUDENT_MAX], mix.temperature, out=student)
    by_label = None
    factor = forward  # of q
    if mix.labels and mix.temperature == 1.0:
        factor = factor + labels
    elif mix.labels:
        by_label = (r * mix.temperature).exp_().mul_(labels / at[:, LABEL_SUM])
    if mix.reverse > 0.0:
        factor = _difference(r, y).sub_(at[:, REVERSE] / at[:, STUDENT_SUM]).mul_(reverse).add_(factor)
    ds = r.exp_().mul_(factor.div_(at[:, STUDENT_SUM]) if mix.reverse > 0.0 else factor / at[:, STUDENT_SUM])
    if mix.reverse < 1.0:
        ds.sub_(y.exp_().mul_(forward / at[:, TEACHER_SUM]))
    if by_label is not None:
        ds.add_(by_label)
    if mix.labels and ds.shape[1]:
        column = target.clamp(min=0)[:, None]
        ds.scatter_add_(1, column, torch.where(target[:, None] >= 0, -labels, 0.0))  # one element per row: exact
