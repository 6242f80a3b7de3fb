"""The chunked backend's epilogue on a GPU: four Triton kernels behind the interface of epilogue.py.

One program per row. The chunk holds fp32 logits (the GEMMs accumulate the specialists' segments there without
rounding). Their gradient is written over them in the GEMM's operand type: a 16-bit row starts where its fp32 row
started and fills its first half, so one buffer serves both and the GEMM reads it with twice the leading dimension.
"""

# What a kernel takes is typed by Triton's compiler.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultrafuser_mega.ops.epilogue_torch import TorchEpilogue
from ultrafuser_mega.ops.operators import launch_operator

# (BLOCK, warps) by kernel: columns that a program looks at in one step; tools/benchmarks/tune_kernels.py times others
STEPS = {
    "row statistics": (4096, 8),
    "dlogits": (4096, 8),
    "mixture statistics": (1024, 8),  # columns of each of the n logit planes
    "mixture dlogits": (1024, 8),  # likewise
}


def options(kernel: str) -> dict[str, Any]:
    """How Triton is to compile it; what it fuses by default is another thing in every version."""
    return {"num_warps": STEPS[kernel][1], "enable_fp_fusion": True}


@triton.jit
def row_statistics_kernel(
    logits,  # (C, R) fp32
    target,  # (C,) int64: local column or -1
    statistics,  # (C, 4) fp32 out
    columns,
    row_stride,
    BLOCK: tl.constexpr,
):
    """max, sum-exp, target and shifted sum of one row in one sweep, rescaled whenever the maximum grows."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    top = -float("inf")
    total = 0.0
    shifted = 0.0
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        z = tl.load(base + v, mask=inside, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
        total = total * tl.exp(top - origin) + tl.sum(tl.exp(z - origin), 0)
        old = tl.where(start == 0, origin, top)  # the origin of what was summed so far: `start` columns
        shifted = shifted + start * (old - origin) + tl.sum(tl.where(inside, z - origin, 0.0), 0)
        top = new_top
    y = tl.load(target + row)
    z_y = tl.load(base + tl.maximum(y, 0), mask=(y >= 0) & (y < columns), other=-float("inf"))
    out = statistics + row * 4
    tl.store(out + 0, top)
    tl.store(out + 1, total)
    tl.store(out + 2, tl.where(z_y == -float("inf"), -float("inf"), z_y - top))
    tl.store(out + 3, shifted)


@triton.jit
def dlogits_kernel(
    logits,  # (C, R) fp32 in
    gradient,  # (C, R) out, the same memory: row stride doubled if 16-bit
    target,  # (C,) int64: local column or -1
    row_max,  # (C,) fp32
    coefficient_a,  # (C,) fp32
    coefficient_b,  # (C,) fp32
    coefficient_c,  # (C,) fp32
    columns,
    row_stride,
    gradient_stride,
    BLOCK: tl.constexpr,
):
    """z -> a exp(z - M) - b [v = y] - c in place; exactly 0 where a = b = c = 0."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    top = tl.load(row_max + row)
    a = tl.load(coefficient_a + row)
    b = tl.load(coefficient_b + row)
    c = tl.load(coefficient_c + row)
    dead = (a == 0) & (b == 0) & (c == 0)
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        z = tl.load(logits + row * row_stride + v, mask=inside, other=-float("inf"))
        # 16-bit results land on fp32 logits of this or an earlier block: all threads must have read theirs
        tl.debug_barrier()
        dz = a * tl.exp(z - top) - c - tl.where(v == y, b, 0.0)
        dz = tl.where(dead, 0.0, dz)
        tl.store(gradient + row * gradient_stride + v, dz.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def mixed(first, plane_stride, inside, weights, specialists: tl.constexpr):
    """z = sum_j w_j o_j where the first plane's are at ``first``. Fused explicitly, one specialist after the other: the
    same bits in every kernel, whatever its tiles and the compiler's taste."""
    z = 0.0
    for j in tl.static_range(specialists):
        o = tl.load(first + plane_stride.to(tl.int64) * j, mask=inside, other=0.0)
        z = tl.fma(o, tl.load(weights + j), z)
    return z


@triton.jit
def mixture_statistics_kernel(
    logits,  # (n, C, R) fp32
    gate_weights,  # (C, n) fp32
    target,  # (C,) int64: local column or -1
    statistics,  # (C, 4 + 3 n) fp32 out
    columns,
    row_stride,
    plane_stride,
    specialists: tl.constexpr,
    PADDED: tl.constexpr,  # specialists rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """The four numbers of z = sum_j w_j o_j and, per specialist, its expectation, target and sum relative to z."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, PADDED).to(tl.int64)  # n planes of one GPU's memory may pass 2^31 numbers
    real = j < specialists
    first, weights = logits + row * row_stride, gate_weights + row * specialists
    base = first + j[:, None] * plane_stride
    top = -float("inf")
    total = 0.0
    shifted = 0.0
    expectation = tl.zeros((PADDED,), tl.float32)
    deviation_sum = tl.zeros((PADDED,), tl.float32)
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        o = tl.load(base + v[None, :], mask=real[:, None] & inside[None, :], other=0.0)  # (PADDED, BLOCK)
        z = mixed(first + v, plane_stride, inside, weights, specialists)  # (BLOCK,)
        new_top = tl.maximum(top, tl.max(tl.where(inside, z, -float("inf")), 0))
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
        scale = tl.exp(top - origin)
        e = tl.where(inside, tl.exp(z - origin), 0.0)
        deviation = tl.where(inside[None, :], o - z[None, :], 0.0)
        total = total * scale + tl.sum(e, 0)
        old = tl.where(start == 0, origin, top)
        shifted = shifted + start * (old - origin) + tl.sum(tl.where(inside, z - origin, 0.0), 0)
        expectation = expectation * scale + tl.sum(e[None, :] * deviation, 1)
        deviation_sum = deviation_sum + tl.sum(deviation, 1)
        top = new_top
    y = tl.load(target + row)
    here = (y >= 0) & (y < columns)
    column = tl.where(here, y, 0)
    o_y = tl.load(first + j * plane_stride + column, mask=real, other=0.0)
    z_y = mixed(first + column, plane_stride, here, weights, specialists)
    out = statistics + row * (4 + 3 * specialists)
    tl.store(out + 0, top)
    tl.store(out + 1, total)
    tl.store(out + 2, tl.where(here, z_y - top, -float("inf")))
    tl.store(out + 3, shifted)
    tl.store(out + 4 + j, expectation, mask=real)
    tl.store(out + 4 + specialists + j, tl.where(here, o_y - z_y, 0.0), mask=real)
    tl.store(out + 4 + 2 * specialists + j, deviation_sum, mask=real)


@triton.jit
def mixture_dlogits_kernel(
    logits,  # (n, C, R) fp32 in
    gradient,  # (n, C, R) out, the same memory: strides doubled if 16-bit
    gate_weights,  # (C, n) fp32
    target,  # (C,) int64: local column or -1
    row_max,  # (C,) fp32
    coefficient_a,  # (C,) fp32
    coefficient_b,  # (C,) fp32
    coefficient_c,  # (C,) fp32
    columns,
    row_stride,
    plane_stride,
    gradient_stride,
    gradient_plane_stride,
    specialists: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o_j -> w_j (a exp(z - M) - b [v = y] - c) in place; exactly 0 where a = b = c = 0."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    top = tl.load(row_max + row)
    a = tl.load(coefficient_a + row)
    b = tl.load(coefficient_b + row)
    c = tl.load(coefficient_c + row)
    dead = (a == 0) & (b == 0) & (c == 0)
    weights = gate_weights + row * specialists
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < columns
        z = mixed(logits + row * row_stride + v, plane_stride, inside, weights, specialists)
        # 16-bit results land on fp32 logits of this or an earlier block: all threads must have read theirs
        tl.debug_barrier()
        dz = a * tl.exp(z - top) - c - tl.where(v == y, b, 0.0)
        dz = tl.where(dead, 0.0, dz)
        out = gradient + row * gradient_stride + v
        for j in tl.static_range(specialists):
            scaled = (tl.load(weights + j) * dz).to(gradient.dtype.element_ty)
            tl.store(out + gradient_plane_stride.to(tl.int64) * j, scaled, mask=inside)


@launch_operator("triton_row_statistics(Tensor logits, Tensor target, Tensor(a!) statistics)")
def _row_statistics(logits: Tensor, target: Tensor, statistics: Tensor) -> None:
    rows, columns = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        row_statistics_kernel[(rows,)](
            logits,
            target,
            statistics,
            columns,
            logits.stride(0),
            BLOCK=STEPS["row statistics"][0],
            **options("row statistics"),
        )


@launch_operator(
    "triton_dlogits(Tensor(a!) logits, Tensor(b!) gradient, Tensor target, Tensor row_max,"
    " Tensor a, Tensor b, Tensor c)"
)
def _dlogits(
    logits: Tensor, gradient: Tensor, target: Tensor, row_max: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> None:
    rows, columns = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        dlogits_kernel[(rows,)](
            logits,
            gradient,
            target,
            row_max,
            a,
            b,
            c,
            columns,
            logits.stride(0),
            gradient.stride(0),
            BLOCK=STEPS["dlogits"][0],
            **options("dlogits"),
        )


@launch_operator("triton_mixture_statistics(Tensor logits, Tensor gate_weights, Tensor target, Tensor(a!) statistics)")
def _mixture_statistics(logits: Tensor, gate_weights: Tensor, target: Tensor, statistics: Tensor) -> None:
    specialists, rows, columns = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        mixture_statistics_kernel[(rows,)](
            logits,
            gate_weights,
            target,
            statistics,
            columns,
            logits.stride(1),
            logits.stride(0),
            specialists=specialists,
            PADDED=triton.next_power_of_2(specialists),
            BLOCK=STEPS["mixture statistics"][0],
            **options("mixture statistics"),
        )


@launch_operator(
    "triton_mixture_dlogits(Tensor(a!) logits, Tensor(b!) gradient, Tensor gate_weights, Tensor target,"
    " Tensor row_max, Tensor a, Tensor b, Tensor c)"
)
def _mixture_dlogits(
    logits: Tensor,
    gradient: Tensor,
    gate_weights: Tensor,
    target: Tensor,
    row_max: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> None:
    specialists, rows, columns = logits.shape
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        mixture_dlogits_kernel[(rows,)](
            logits,
            gradient,
            gate_weights,
            target,
            row_max,
            a,
            b,
            c,
            columns,
            logits.stride(1),
            logits.stride(0),
            gradient.stride(1),
            gradient.stride(0),
            specialists=specialists,
            BLOCK=STEPS["mixture dlogits"][0],
            **options("mixture dlogits"),
        )


class TritonEpilogue:
    """fp32 logits in; gradients in ``operand_dtype`` (bf16, fp16 or fp32)."""

    def __init__(self, operand_dtype: torch.dtype) -> None:
        self.operand_dtype = operand_dtype

    def statistics(self, logits: Tensor, target: Tensor, keep: bool) -> tuple[Tensor, None]:
        out = logits.new_empty((logits.shape[0], 4))
        _row_statistics(logits, target.contiguous(), out)
        return out, None

    def dlogits(
        self,
        logits: Tensor,
        scratch: None,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        gradient = in_place_view(logits, self.operand_dtype)
        _dlogits(logits, gradient, *(t.contiguous() for t in (target, row_max, *coefficients)))
        return gradient

    def mixture_statistics(self, logits: Tensor, gate_weights: Tensor, target: Tensor) -> Tensor:
        specialists, rows, columns = logits.shape
        if columns == 0:  # a shard without real rows
            return TorchEpilogue(torch.float32).mixture_statistics(logits, gate_weights, target)
        out = logits.new_empty((rows, 4 + 3 * specialists))
        _mixture_statistics(logits, gate_weights.contiguous(), target.contiguous(), out)
        return out

    def mixture_dlogits(
        self,
        logits: Tensor,
        gate_weights: Tensor,
        target: Tensor,
        row_max: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        gradient = in_place_view(logits, self.operand_dtype)
        given = (t.contiguous() for t in (gate_weights, target, row_max, *coefficients))
        _mixture_dlogits(logits, gradient, *given)
        return gradient


def in_place_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """(.., C, R) of ``dtype`` whose row i starts at the same address as row i of the fp32 ``logits``."""
    return logits.view(dtype)[..., : logits.shape[-1]]
