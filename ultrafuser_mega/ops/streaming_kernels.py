"""Triton kernels of the streaming backend: fused logits live and die in registers, tile by tile.

A tile of BLOCK_M rows x BLOCK_N vocabulary columns walks the specialists' K-segments in place (ragged widths, no
concatenated copy) on tensor cores: z = sum_j (w_j h_j) W_j^T in one fp32 accumulator. What happens to z differs:

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
    weight,  # (BLOCK_M,) fp32 gate weights, used if SCALED
    tile,  # (BLOCK_M, BLOCK_N) fp32, added to
    SCALED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tile + h_j W_j^T, or tile + (w_j h_j) W_j^T with w_j h_j rounded to the operand's type if SCALED."""
    k = tl.arange(0, BLOCK_K)
    x_at = hidden + rows[:, None] * hidden_stride + k[None, :]
    w_at = head + columns[None, :] * head_stride + k[:, None]
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = start + k < width
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        if SCALED:
            x = (x * weight[:, None]).to(x.dtype)
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
    SMOOTHING: tl.constexpr,  # whether plain sums are wanted, too
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    begin = tl.program_id(1) * split_columns
    end = tl.minimum(begin + split_columns, R)
    y = tl.load(target + rows).to(tl.int32)

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
            weight = tl.load(gate_weights + rows * n + j)
            if PER_SPECIALIST:
                o = segment_tile(
                    hidden[j], heads[j], rows, columns, hidden_strides[j], head_strides[j], widths[j],
                    weight, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), False, EVEN_K, BLOCK_K,
                )  # fmt: skip
                z += weight[:, None] * o
                tiles = tiles + (o,)
            else:
                z = segment_tile(
                    hidden[j], heads[j], rows, columns, hidden_strides[j], head_strides[j], widths[j],
                    weight, z, True, EVEN_K, BLOCK_K,
                )  # fmt: skip
        at_target += tl.sum(tl.where(column[None, :] == y[:, None], z, 0.0), 1)  # y lies outside other splits: `here`
        z = tl.where(inside, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
        if SMOOTHING:
            old = origin
            if start > begin:
                old = top
            shifted += (start - begin) * (old - origin) + tl.sum(tl.where(inside, z - origin[:, None], 0.0), 1)
        scale = tl.exp(top - origin)
        e = tl.exp(z - origin[:, None])  # 0 outside
        total = total * scale + tl.sum(e, 1)
        top = new_top
        if PER_SPECIALIST:
            new_expectations = ()
            new_targets = ()
            new_sums = ()
            for j in tl.static_range(n):
                deviation = tl.where(inside, tiles[j] - z, 0.0)
                new_expectations = new_expectations + (expectations[j] * scale + tl.sum(e * deviation, 1),)
                at_y = tl.where(column[None, :] == y[:, None], deviation, 0.0)
                new_targets = new_targets + (targets[j] + tl.sum(at_y, 1),)
                if SMOOTHING:
                    new_sums = new_sums + (sums[j] + tl.sum(deviation, 1),)
                else:
                    new_sums = new_sums + (sums[j],)
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
        z = segment_tile(
            hidden[j], heads[j], rows, columns, hidden_strides[j], head_strides[j], widths[j],
            tl.load(gate_weights + rows * n + j), z, True, EVEN_K, BLOCK_K,
        )  # fmt: skip
    y = tl.load(target + rows).to(tl.int32)
    a = tl.load(coefficient_a + rows)
    b = tl.load(coefficient_b + rows)
    c = tl.load(coefficient_c + rows)
    dead = (a == 0) & (b == 0) & (c == 0)
    dz = a[:, None] * tl.exp(z - tl.load(row_max + rows)[:, None]) - c[:, None]
    dz = dz - tl.where(column[None, :] == y[:, None], b[:, None], 0.0)
    dz = tl.where(dead[:, None], 0.0, dz)
    at = gradient + rows[:, None] * gradient_stride + (columns - begin)[None, :]
    tl.store(at, dz.to(gradient.dtype.element_ty), mask=(row < N)[:, None] & (column < end)[None, :])
