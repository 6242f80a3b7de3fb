"""The epilogue of distillation_epilogue.py on a CPU: csrc/cpu_distillation.cpp.

Two sweeps over both models' logits, with two exponentials each of a pair of them (a third where T is not 1, for the
labels; one less in the gradient of reverse KL), on torch.get_num_threads() threads; fp32 and fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.ops.distillation_statistics import COLUMNS, FORWARD, REVERSE, Mix
from ultrafuser_mega.ops.epilogue_cpu import _cpu_epilogue
from ultrafuser_mega.ops.operators import launch_operator

STATISTICS = {
    torch.float32: _cpu_epilogue.distillation_statistics_f32,
    torch.float64: _cpu_epilogue.distillation_statistics_f64,
}
DLOGITS = {torch.float32: _cpu_epilogue.distillation_dlogits_f32, torch.float64: _cpu_epilogue.distillation_dlogits_f64}


def _lesson(teacher: Tensor, student: Tensor, target: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """Addresses, rows, columns and strides, as both of them take them."""
    addresses = teacher.data_ptr(), student.data_ptr(), target.data_ptr()
    rows, columns = teacher.shape
    return *addresses, rows, columns, teacher.stride(0), student.stride(0)


@launch_operator(
    "cpu_distillation_statistics(Tensor teacher, Tensor student, Tensor target, float temperature,"
    " Tensor(a!) statistics)"
)
def _statistics(teacher: Tensor, student: Tensor, target: Tensor, temperature: float, statistics: Tensor) -> None:
    STATISTICS[teacher.dtype](
        *_lesson(teacher, student, target),
        temperature,
        statistics.data_ptr(),
        torch.get_num_threads(),
    )


@launch_operator(
    "cpu_distillation_dlogits(Tensor teacher, Tensor(a!) student, Tensor target, float temperature, float forward,"
    " float reverse, float labels, Tensor statistics, Tensor weight)"
)
def _dlogits(
    teacher: Tensor,
    student: Tensor,
    target: Tensor,
    temperature: float,
    forward: float,
    reverse: float,
    labels: float,
    statistics: Tensor,
    weight: Tensor,
) -> None:
    DLOGITS[teacher.dtype](
        *_lesson(teacher, student, target),
        temperature,
        forward,
        reverse,
        labels,
        statistics.data_ptr(),
        weight.data_ptr(),
        torch.get_num_threads(),
    )


class CpuEpilogue:
    """fp32 or fp64 logits; their gradient has the same type."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, teacher: Tensor, student: Tensor, target: Tensor, mix: Mix) -> Tensor:
        out = teacher.new_empty((teacher.shape[0], COLUMNS))
        _statistics(teacher, student, target.contiguous(), mix.temperature, out)
        for share, column in ((1.0 - mix.reverse, FORWARD), (mix.reverse, REVERSE)):
            if share == 0.0:
                out[:, column] = 0.0
        return out

    def dlogits(
        self, teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, weight: Tensor, mix: Mix
    ) -> Tensor:
        shares = (mix.temperature, *mix.divergences, mix.labels)
        _dlogits(teacher, student, target.contiguous(), *shares, statistics.contiguous(), weight.contiguous())
        return student
