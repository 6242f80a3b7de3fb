"""The epilogue of distillation_epilogue.py on a GPU: two Triton kernels, one program per row.

Both models' fp32 logits are read once for the statistics and once for the gradient, which is written over the
student's in the GEMM's operand type as epilogue_triton.py does it.
"""

# What a kernel takes is typed by Triton's compiler.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultrafuser_mega.ops.distillation_epilogue import FLOOR, TorchEpilogue
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
from ultrafuser_mega.ops.epilogue_triton import in_place_view
from ultrafuser_mega.ops.operators import launch_operator

BLOCK, WARPS = 4096, 8


@triton.jit
def distillation_statistics_kernel(
    teacher,  # (C, R) fp32
    student,  # (C, R) fp32
    target,  # (C,) int64: local column or -1
    statistics,  # (C, 8) fp32 out
    columns,
    row_stride,
    temperature,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The eight numbers of one row in one sweep, rescaled whenever a maximum grows, as those of shards are."""
    row = tl.program_id(0).to(tl.int64)
    z_base, s_base = teacher + row * row_stride, student + row * row_stride
    z_top = -float("inf")
    s_top = -float("inf")
    z_sum = 0.0
    s_sum = 0.0
    forward = 0.0
    reverse = 0.0
    label_sum = 0.0
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        z = tl.load(z_base + v, mask=inside, other=-float("inf"))
        s = tl.load(s_base + v, mask=inside, other=-float("inf"))
        new_z, new_s = tl.maximum(z_top, tl.max(z, 0)), tl.maximum(s_top, tl.max(s, 0))
        z_origin = tl.where(new_z == -float("inf"), 0.0, new_z)  # -inf - -inf is NaN
        s_origin = tl.where(new_s == -float("inf"), 0.0, new_s)
        a = tl.where(z_top == -float("inf"), 0.0, (z_top - z_origin) / temperature)
        b = tl.where(s_top == -float("inf"), 0.0, (s_top - s_origin) / temperature)
        y = tl.maximum((z - z_origin) / temperature, FLOOR)
        r = tl.maximum((s - s_origin) / temperature, FLOOR)
        known, own = tl.where(inside, tl.exp(y), 0.0), tl.where(inside, tl.exp(r), 0.0)
        forward = tl.exp(a) * (forward + (a - b) * z_sum) + tl.sum(known * (y - r), 0)
        reverse = tl.exp(b) * (reverse - (a - b) * s_sum) - tl.sum(own * (y - r), 0)
        label_sum = label_sum * tl.exp(b * temperature) + tl.sum(tl.where(inside, tl.exp(r * temperature), 0.0), 0)
        z_sum = z_sum * tl.exp(a) + tl.sum(known, 0)
        s_sum = s_sum * tl.exp(b) + tl.sum(own, 0)
        z_top, s_top = new_z, new_s
    label = tl.load(target + row)
    here = (label >= 0) & (label < columns)
    s_label = tl.load(s_base + tl.where(here, label, 0), mask=here, other=-float("inf"))
    out = statistics + row * 8
    tl.store(out + 0, z_top)
    tl.store(out + 1, s_top)
    tl.store(out + 2, z_sum)
    tl.store(out + 3, s_sum)
    tl.store(out + 4, forward)
    tl.store(out + 5, reverse)
    tl.store(out + 6, label_sum)
    tl.store(out + 7, tl.where(s_label == -float("inf"), -float("inf"), s_label - s_top))


@triton.jit
def distillation_gradient_kernel(
    teacher,  # (C, R) fp32 in
    student,  # (C, R) fp32 in
    gradient,  # (C, R) out, the student's memory: row stride doubled if 16-bit
    target,  # (C,) int64: local column or -1
    coefficients,  # (C, 8) fp32: maxima of both, then c_0 .. c_5
    columns,
    row_stride,
    gradient_stride,
    temperature,
    FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s -> exp(r) (c_0 + c_1 (r - y - c_2)) - c_3 exp(y) + c_4 exp(T r) - c_5 [v = label], in place."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    at = coefficients + row * 8
    z_origin, s_origin = tl.load(at), tl.load(at + 1)
    c_0, c_1, c_2 = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    c_3, c_4, c_5 = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        z = tl.load(teacher + row * row_stride + v, mask=inside, other=-float("inf"))
        s = tl.load(student + row * row_stride + v, mask=inside, other=-float("inf"))
        # 16-bit results land on fp32 logits of this or an earlier block: all threads must have read theirs
        tl.debug_barrier()
        y = tl.maximum((z - z_origin) / temperature, FLOOR)
        r = tl.maximum((s - s_origin) / temperature, FLOOR)
        ds = tl.exp(r) * (c_0 + c_1 * (r - y - c_2)) - c_3 * tl.exp(y) + c_4 * tl.exp(r * temperature)
        ds = ds - tl.where(v == label, c_5, 0.0)
        tl.store(gradient + row * gradient_stride + v, ds.to(gradient.dtype.element_ty), mask=inside)


@launch_operator(
    "triton_distillation_statistics(Tensor teacher, Tensor student, Tensor target, Tensor(a!) statistics,"
    " float temperature)"
)
def _statistics(teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, temperature: float) -> None:
    rows, columns = student.shape
    with torch.cuda.device_of(student):  # Triton launches on the current device
        distillation_statistics_kernel[(rows,)](
            teacher,
            student,
            target,
            statistics,
            columns,
            student.stride(0),
            temperature,
            FLOOR=FLOOR,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


@launch_operator(
    "triton_distillation_gradient(Tensor teacher, Tensor student, Tensor(a!) gradient, Tensor target,"
    " Tensor coefficients, float temperature)"
)
def _gradient(
    teacher: Tensor, student: Tensor, gradient: Tensor, target: Tensor, coefficients: Tensor, temperature: float
) -> None:
    rows, columns = student.shape
    with torch.cuda.device_of(student):
        distillation_gradient_kernel[(rows,)](
            teacher,
            student,
            gradient,
            target,
            coefficients,
            columns,
            student.stride(0),
            gradient.stride(0),
            temperature,
            FLOOR=FLOOR,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


class TritonEpilogue:
    """fp32 logits in; gradients in ``operand_dtype`` (bf16, fp16 or fp32). Both models' rows are equally far apart."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, teacher: Tensor, student: Tensor, target: Tensor, mix: Mix) -> Tensor:
        if student.shape[1] == 0:  # a shard without real rows
            return TorchEpilogue(torch.float32).statistics(teacher, student, target, mix)
        out = student.new_empty((student.shape[0], COLUMNS))
        _statistics(teacher, student, target.contiguous(), out, mix.temperature)
        return out

    def dlogits(
        self, teacher: Tensor, student: Tensor, target: Tensor, statistics: Tensor, weight: Tensor, mix: Mix
    ) -> Tensor:
        gradient = in_place_view(student, self.operand_dtype)
        if student.shape[1]:
            coefficients = gradient_coefficients(statistics, weight, mix)
            _gradient(teacher, student, gradient, target.contiguous(), coefficients, mix.temperature)
        return gradient


def gradient_coefficients(statistics: Tensor, weight: Tensor, mix: Mix) -> Tensor:
    """(C, 8): maxima of both and c_0 .. c_5 of the gradient; those are 0 where the weight (C,) is."""
    forward, reverse = (weight * (factor / mix.temperature) for factor in mix.divergences)
    labels = weight * mix.labels
    known, own = statistics[:, TEACHER_SUM], statistics[:, STUDENT_SUM]
    of_rows = (
        forward / own,
        reverse / own,
        statistics[:, REVERSE] / own,
        forward / known,
        labels / statistics[:, LABEL_SUM],
        labels,
    )
    maxima = statistics[:, TEACHER_MAX], statistics[:, STUDENT_MAX]
    finite = tuple(top.masked_fill(top == float("-inf"), 0.0) for top in maxima)
    return torch.stack((*finite, *of_rows), dim=1)
