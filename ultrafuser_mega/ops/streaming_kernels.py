"""Triton kernels of the streaming backend: fused logits live and die in registers, tile by tile.

A tile of BLOCK_M rows x BLOCK_N vocabulary columns walks the specialists' K-segments in place (ragged widths, no
concatenated copy): o_j = h_j W_j^T on tensor cores in fp32, z = sum_j w_j o_j. What happens to z differs:

    statistics_kernel  a program walks one split of the vocabulary with an online softmax and writes a few numbers per
                       row and split (statistics.py); with PER_SPECIALIST also the expectations the gate alone needs
    dlogits_kernel     z is turned into dz with the known normaliser and written in the GEMM operand's type

No atomics and no order that depends on timing. A row's numbers depend on its own inputs and on the vocabulary's split
alone, so its loss is the same to the bit in whatever batch it comes.

The tuples of tensors are unrolled at compile time: one compiled kernel per number of specialists.
"""

# Triton knows tuple concatenation, but neither unpacking nor annotations of what grows:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_tile(
    hidden,  # (N, width), row stride hidden_stride
    head,  # (R, width), row stride head_stride
    rows,  # (BLOCK_M,) int64, all valid
    columns,  # (BLOCK_N,) int64, all valid
    hidden_stride,
    head_stride,
    width,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One specialist's logits (BLOCK_M, BLOCK_N) fp32."""
    k = tl.arange(0, BLOCK_K)
    x_at = hidden + rows[:, None] * hidden_stride + k[None, :]
    w_at = head + columns[None, :] * head_stride + k[:, None]
    tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = start + k < width
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        tile = tl.dot(x, w, tile, input_precision="ieee")  # matters for fp32 only
        x_at += BLOCK_K
        w_at += BLOCK_K
    return tile


@triton.jit
def statistics_kernel(
    hidden,  # n x (N, d_j)
    heads,  # n x (R, d_j)
    hidden_strides,  # n
    head_strides,  # n
    widths,  # n
    gate_weights,  # (N, n) fp32
    target,  # (N,) int64: local column or -1
    statistics,  # (splits, N, 4 or 4 + 3 n) fp32 out
    N,
    R,
    split_columns,
    n: tl.constexpr,
    PER_SPECIALIST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    begin = tl.program_id(1) * split_columns
    end = tl.minimum(begin + split_columns, R)
    y = tl.load(target + rows)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    shifted = tl.zeros((BLOCK_M,), tl.float32)
    at_target = tl.zeros((BLOCK_M,), tl.float32)
    expectations = ()
    targets = ()
    sums = ()
    if PER_SPECIALIST:
        for _ in tl.static_range(n):
            expectations = expectations + (tl.zeros((BLOCK_M,), tl.float32),)
            targets = targets + (tl.zeros((BLOCK_M,), tl.float32),)
            sums = sums + (tl.zeros((BLOCK_M,), tl.float32),)

    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        columns = tl.minimum(column, R - 1).to(tl.int64)
        inside = (column < end)[None, :]
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        tiles = ()
        for j in tl.static_range(n):
            o = segment_tile(
                hidden[j], heads[j], rows, columns, hidden_strides[j], head_strides[j], widths[j],
                EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            z += tl.load(gate_weights + rows * n + j)[:, None] * o
            if PER_SPECIALIST:
                tiles = tiles + (o,)
        new_top = tl.maximum(top, tl.max(tl.where(inside, z, -float("inf")), 1))
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
        scale = tl.exp(top - origin)
        old = origin
        if start > begin:
            old = top
        e = tl.where(inside, tl.exp(z - origin[:, None]), 0.0)
        is_target = column[None, :] == y[:, None]
        total = total * scale + tl.sum(e, 1)
        shifted = shifted + (start - begin) * (old - origin) + tl.sum(tl.where(inside, z - origin[:, None], 0.0), 1)
        at_target = at_target + tl.sum(tl.where(is_target & inside, z, 0.0), 1)
        top = new_top
        if PER_SPECIALIST:
            new_expectations = ()
            new_targets = ()
            new_sums = ()
            for j in tl.static_range(n):
                deviation = tl.where(inside, tiles[j] - z, 0.0)
                new_expectations = new_expectations + (expectations[j] * scale + tl.sum(e * deviation, 1),)
                new_targets = new_targets + (targets[j] + tl.sum(tl.where(is_target, deviation, 0.0), 1),)
                new_sums = new_sums + (sums[j] + tl.sum(deviation, 1),)
            expectations = new_expectations
            targets = new_targets
            sums = new_sums

    width: tl.constexpr = 4 + 3 * n if PER_SPECIALIST else 4
    out = statistics + (tl.program_id(1).to(tl.int64) * N + rows) * width
    real = row < N
    here = (y >= begin) & (y < end)
    tl.store(out, top, mask=real)
    tl.store(out + 1, total, mask=real)
    tl.store(out + 2, tl.where(here, at_target - top, -float("inf")), mask=real)
    tl.store(out + 3, shifted, mask=real)
    if PER_SPECIALIST:
        for j in tl.static_range(n):
            tl.store(out + 4 + j, expectations[j], mask=real)
            tl.store(out + 4 + n + j, targets[j], mask=real)
            tl.store(out + 4 + 2 * n + j, sums[j], mask=real)


@triton.jit
def dlogits_kernel(
    hidden,  # n x (N, d_j)
    heads,  # n x (R, d_j)
    hidden_strides,  # n
    head_strides,  # n
    widths,  # n
    gate_weights,  # (N, n) fp32
    target,  # (N,) int64: local column or -1
    row_max,  # (N,) fp32, over the whole vocabulary
    coefficient_a,  # (N,) fp32
    coefficient_b,  # (N,) fp32
    coefficient_c,  # (N,) fp32
    gradient,  # (N, end - begin) out, in the operand's type
    N,
    begin,
    end,
    gradient_stride,
    n: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz = a exp(z - M) - b [v = y] - c for the vocabulary columns begin .. end; exactly 0 where a = b = c = 0."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    column = begin + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(column, end - 1).to(tl.int64)
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in tl.static_range(n):
        o = segment_tile(
            hidden[j], heads[j], rows, columns, hidden_strides[j], head_strides[j], widths[j],
            EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        z += tl.load(gate_weights + rows * n + j)[:, None] * o
    y = tl.load(target + rows)
    a = tl.load(coefficient_a + rows)
    b = tl.load(coefficient_b + rows)
    c = tl.load(coefficient_c + rows)
    dead = (a == 0) & (b == 0) & (c == 0)
    dz = a[:, None] * tl.exp(z - tl.load(row_max + rows)[:, None]) - c[:, None]
    dz = dz - tl.where(column[None, :] == y[:, None], b[:, None], 0.0)
    dz = tl.where(dead[:, None], 0.0, dz)
    at = gradient + rows[:, None] * gradient_stride + (columns - begin)[None, :]
    tl.store(at, dz.to(gradient.dtype.element_ty), mask=(row < N)[:, None] & (column < end)[None, :])
