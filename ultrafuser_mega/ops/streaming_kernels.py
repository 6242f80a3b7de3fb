"""Triton kernels of the streaming backend: fused logits live and die in registers, tile by tile.

A tile of BLOCK_M rows x BLOCK_N vocabulary columns walks the specialists' K-segments in place (ragged widths, no
concatenated copy) on tensor cores, in one fp32 accumulator: z = sum_j w_j o_j, o_j = h_j W_j^T. What becomes of z:

    statistics_kernel       a program walks one split of the vocabulary with an online softmax and writes a few numbers
                            per row and split (statistics.py)
    gate_statistics_kernel  the same, and the expectations that the gate alone needs: one accumulator per specialist
    dlogits_kernel          z is turned into dz and written in the GEMM operand's type

How 16-bit operands are weighed: by Horner's rule, z = w_n (((o_1 r_2) + o_2) r_3 + o_3 ..) with r_j = w_(j-1) / w_j.
The accumulator is multiplied once per segment, operands go from shared memory into the tensor cores as they are, and
w_j h_j is rounded nowhere. A weight below TINY_WEIGHT would make a ratio that overflows: such a specialist leaves the
row's accumulator in the units it has, and its operand is scaled on its way through registers, and rounded, which only a
logit of its own beyond 1e14 could show. Only a block of rows that holds such a weight pays for that, and only in that
specialist's segment, where its other rows are multiplied by 1. A part of a logit beyond 1.8e19, some word's mask, may
become infinite.
fp32 operands never meet a tensor core: there w_j h_j is formed in registers, as plain PyTorch does.

An element of z has the same bits in every tile, whatever BLOCK_M, BLOCK_N and BLOCK_K are, forward and backward: its
sum over k runs in one order, what it is multiplied by depends on its row alone, and the last product is rounded before
anything else is done to z. The backward needs that: its exp(z - M) are probabilities under the maximum and the sum that
the forward found. Tiles may not mix instructions whose sums run in another order:
those for one GPU and type are all wgmma, all tcgen05 or all mma.

With TMA the operands are fetched through tensor descriptors (16-byte aligned rows, compute capability 9.0 and newer),
which fill what lies beyond the edges with zeros; without, through pointers. SPECIALIZED gives the fetches warps of
their own where Triton can (Blackwell). Neither changes a result: the order of the sums over k is the same.

No atomics and no order that depends on timing. A row's numbers depend on its own inputs and on the vocabulary's split
alone, so its loss is the same to the bit in whatever batch it comes.

The tuples of tensors are unrolled at compile time: one compiled kernel per number of specialists.
"""

# Triton knows tuple concatenation, but neither unpacking nor annotations of what grows:
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

# What a kernel takes is typed by Triton's compiler.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Programs that run at the same time share 16 blocks of rows and as many of columns as fill the GPU: about as many
# operand rows of either kind, which is what the L2 cache likes best.
GROUP = tl.constexpr(16)
# Of gate weights. Ratios up to 2^64 leave as much room again below fp32's 2^128 for the logits themselves; gate logits
# 44 apart are so rare that the detour costs nothing.
TINY_WEIGHT = tl.constexpr(2.0**-64)


@triton.jit
def place(program, row_blocks, column_blocks):
    """(row block, column block) of a program, so that neighbours share operands."""
    group = program // (GROUP * column_blocks)
    inside = program % (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def operands(
    tensors, strides, widths, length, n: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr
):
    """The n tensors (length, width): descriptors of BLOCK x K tiles, or the pointers as they are."""
    found = ()
    for j in tl.static_range(n):
        if TMA:
            found = found + (tl.make_tensor_descriptor(tensors[j], [length, widths[j]], [strides[j], 1], [BLOCK, K]),)
        else:
            found = found + (tensors[j],)
    return found


@triton.jit
def segment_tile(
    hidden,  # (N, width): descriptor or pointer
    head,  # (R, width): descriptor or pointer
    first_row,
    first_column,
    rows,  # (BLOCK_M,) int64, all valid
    columns,  # (BLOCK_N,) int64, all valid
    hidden_stride,
    head_stride,
    width,
    weight,  # (BLOCK_M,) fp32 gate weights, used if SCALED
    tile,  # (BLOCK_M, BLOCK_N) fp32, added to
    SCALED: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tile + h_j W_j^T, or tile + (w_j h_j) W_j^T with w_j h_j rounded to the operand's type if SCALED."""
    if TMA:
        for start in tl.range(0, width, BLOCK_K, warp_specialize=SPECIALIZED):
            x = hidden.load([first_row, start])
            w = head.load([first_column, start])
            if SCALED:
                x = (x * weight[:, None]).to(x.dtype)
            tile = tl.dot(x, w.T, tile, input_precision="ieee")  # matters for fp32 only
    else:
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
            tile = tl.dot(x, w, tile, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K
    return tile


@triton.jit
def mixed_tile(
    xs, ws, first_row, first_column, rows, columns, hidden_strides, head_strides, widths, gate_weights, has_tiny,
    n: tl.constexpr, HORNER: tl.constexpr, TMA: tl.constexpr, SPECIALIZED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z (BLOCK_M, BLOCK_N) fp32 of all n specialists, an element's bits the same in any tile; see above."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not HORNER:
        for j in tl.static_range(n):
            z = segment_tile(
                xs[j], ws[j], first_row, first_column, rows, columns, hidden_strides[j], head_strides[j], widths[j],
                tl.load(gate_weights + rows * n + j), z, True, TMA, SPECIALIZED, EVEN_K, BLOCK_K,
            )  # fmt: skip
        return z
    unit = tl.full((BLOCK_M,), 1.0, tl.float32)  # z stands in units of it
    for j in tl.static_range(n):
        weight = tl.load(gate_weights + rows * n + j)
        tiny = weight < TINY_WEIGHT
        new_unit = tl.where(tiny, unit, weight)
        if j > 0:
            z *= (unit / new_unit)[:, None]
        unit = new_unit
        if tl.load(has_tiny + j) == 0:  # what every thread reads from one place, all take one way for
            z = segment_tile(
                xs[j], ws[j], first_row, first_column, rows, columns, hidden_strides[j], head_strides[j], widths[j],
                weight, z, False, TMA, SPECIALIZED, EVEN_K, BLOCK_K,
            )  # fmt: skip
        else:
            z = segment_tile(
                xs[j], ws[j], first_row, first_column, rows, columns, hidden_strides[j], head_strides[j], widths[j],
                tl.where(tiny, weight / unit, 1.0), z, True, TMA, SPECIALIZED, EVEN_K, BLOCK_K,
            )  # fmt: skip
    return tl.fma(z, unit[:, None], 0.0)  # rounded: a plain product could melt into what is done to z next


@triton.jit
def absorb(z, before, left, y, top, total, shifted, at_target, BLOCK_N: tl.constexpr):
    """The running statistics of rows after BLOCK_N more logits z: ``before`` columns were seen, ``left`` are real, and
    the target stands in column y of z or in none of them."""
    column = tl.arange(0, BLOCK_N)[None, :]
    at_target += tl.sum(tl.where(column == y[:, None], z, 0.0), 1)  # y in what is not real: the caller knows
    inside = column < left
    z = tl.where(inside, z, -float("inf"))
    new_top = tl.maximum(top, tl.max(z, 1))
    origin = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
    old = origin
    if before > 0:
        old = top
    shifted += before * (old - origin) + tl.sum(tl.where(inside, z - origin[:, None], 0.0), 1)
    total = total * tl.exp(top - origin) + tl.sum(tl.exp(z - origin[:, None]), 1)
    return new_top, total, shifted, at_target


@triton.jit
def store_four(out, real, mine, top, total, shifted, at_target):
    """The four numbers of statistics.py, of rows that are ``real``; ``mine`` says whose target lies in this split."""
    tl.store(out, top, mask=real)
    tl.store(out + 1, total, mask=real)
    tl.store(out + 2, tl.where(mine, at_target - top, -float("inf")), mask=real)
    tl.store(out + 3, shifted, mask=real)


@triton.jit(do_not_specialize=["N", "R", "split_columns"])  # token counts change with every batch
def statistics_kernel(
    hidden,  # n x (N, d_j)
    heads,  # n x (R, d_j)
    hidden_strides,  # n
    head_strides,  # n
    widths,  # n
    gate_weights,  # (N, n) fp32
    target,  # (N,) int64: local column or -1
    has_tiny,  # (row blocks, n) bool: whether one of the block's rows gives the specialist less than TINY_WEIGHT
    statistics,  # (splits, N, 4) fp32 out
    N,
    R,
    split_columns,
    n: tl.constexpr,
    HORNER: tl.constexpr,  # for 16-bit operands
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    HALVES: tl.constexpr,  # a tile is absorbed in two halves: fewer registers where it lies in registers
):
    row_block, split = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(R, split_columns))
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, R)
    y = tl.load(target + rows).to(tl.int32)
    xs = operands(hidden, hidden_strides, widths, N, n, TMA, BLOCK_M, BLOCK_K)
    ws = operands(heads, head_strides, widths, R, n, TMA, BLOCK_N, BLOCK_K)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    shifted = tl.zeros((BLOCK_M,), tl.float32)
    at_target = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        columns = tl.minimum(start + tl.arange(0, BLOCK_N), R - 1).to(tl.int64)
        z = mixed_tile(
            xs, ws, row_block * BLOCK_M, start, rows, columns, hidden_strides, head_strides, widths, gate_weights,
            has_tiny + row_block * n, n, HORNER, TMA, SPECIALIZED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HALVES:
            half: tl.constexpr = BLOCK_N // 2
            z, z_right = z.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
            middle = start + half
            top, total, shifted, at_target = absorb(
                z, start - begin, end - start, y - start, top, total, shifted, at_target, half
            )
            top, total, shifted, at_target = absorb(
                z_right, middle - begin, end - middle, y - middle, top, total, shifted, at_target, half
            )
        else:
            top, total, shifted, at_target = absorb(
                z, start - begin, end - start, y - start, top, total, shifted, at_target, BLOCK_N
            )
    out = statistics + (split.to(tl.int64) * N + rows) * 4
    real = row < N
    store_four(out, real, (y >= begin) & (y < end), top, total, shifted, at_target)


@triton.jit(do_not_specialize=["N", "R", "split_columns"])
def gate_statistics_kernel(
    hidden,  # n x (N, d_j)
    heads,  # n x (R, d_j)
    hidden_strides,  # n
    head_strides,  # n
    widths,  # n
    gate_weights,  # (N, n) fp32
    target,  # (N,) int64: local column or -1
    statistics,  # (splits, N, 4 + 3 n) fp32 out
    N,
    R,
    split_columns,
    n: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    row_block, split = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(R, split_columns))
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, R)
    y = tl.load(target + rows).to(tl.int32)
    xs = operands(hidden, hidden_strides, widths, N, n, TMA, BLOCK_M, BLOCK_K)
    ws = operands(heads, head_strides, widths, R, n, TMA, BLOCK_N, BLOCK_K)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    shifted = tl.zeros((BLOCK_M,), tl.float32)
    at_target = tl.zeros((BLOCK_M,), tl.float32)
    expectations = ()
    targets = ()
    sums = ()
    for _ in tl.static_range(n):
        expectations = expectations + (tl.zeros((BLOCK_M,), tl.float32),)
        targets = targets + (tl.zeros((BLOCK_M,), tl.float32),)
        sums = sums + (tl.zeros((BLOCK_M,), tl.float32),)
    for start in range(begin, end, BLOCK_N):
        column = tl.arange(0, BLOCK_N)
        columns = tl.minimum(start + column, R - 1).to(tl.int64)
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        tiles = ()
        for j in tl.static_range(n):
            o = segment_tile(
                xs[j], ws[j], row_block * BLOCK_M, start, rows, columns, hidden_strides[j], head_strides[j],
                widths[j], row, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), False, TMA, SPECIALIZED, EVEN_K, BLOCK_K,
            )  # fmt: skip
            z += tl.load(gate_weights + rows * n + j)[:, None] * o
            tiles = tiles + (o,)
        old = top
        top, total, shifted, at_target = absorb(
            z, start - begin, end - start, y - start, top, total, shifted, at_target, BLOCK_N
        )
        origin = tl.where(top == -float("inf"), 0.0, top)
        inside = (column < end - start)[None, :]
        here = column[None, :] == (y - start)[:, None]
        e = tl.where(inside, tl.exp(z - origin[:, None]), 0.0)
        new_expectations = ()
        new_targets = ()
        new_sums = ()
        for j in tl.static_range(n):
            deviation = tl.where(inside, tiles[j] - z, 0.0)
            new_expectations = new_expectations + (expectations[j] * tl.exp(old - origin) + tl.sum(e * deviation, 1),)
            new_targets = new_targets + (targets[j] + tl.sum(tl.where(here, deviation, 0.0), 1),)
            new_sums = new_sums + (sums[j] + tl.sum(deviation, 1),)
        expectations = new_expectations
        targets = new_targets
        sums = new_sums
    out = statistics + (split.to(tl.int64) * N + rows) * (4 + 3 * n)
    real = row < N
    store_four(out, real, (y >= begin) & (y < end), top, total, shifted, at_target)
    for j in tl.static_range(n):
        tl.store(out + 4 + j, expectations[j], mask=real)
        tl.store(out + 4 + n + j, targets[j], mask=real)
        tl.store(out + 4 + 2 * n + j, sums[j], mask=real)


@triton.jit(do_not_specialize=["N", "begin", "end"])
def dlogits_kernel(
    hidden,  # n x (N, d_j)
    heads,  # n x (R, d_j)
    hidden_strides,  # n
    head_strides,  # n
    widths,  # n
    gate_weights,  # (N, n) fp32
    target,  # (N,) int64: local column or -1
    has_tiny,  # (row blocks, n) bool: whether one of the block's rows gives the specialist less than TINY_WEIGHT
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
    HORNER: tl.constexpr,  # for 16-bit operands
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    """dz = a exp(z - M) - b [v = y] - c for the vocabulary columns begin .. end; exactly 0 where a = b = c = 0."""
    row_block, column_block = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(end - begin, BLOCK_N))
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    start = begin + column_block * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    columns = tl.minimum(start + column, end - 1).to(tl.int64)
    xs = operands(hidden, hidden_strides, widths, N, n, TMA, BLOCK_M, BLOCK_K)
    ws = operands(heads, head_strides, widths, end, n, TMA, BLOCK_N, BLOCK_K)
    z = mixed_tile(
        xs, ws, row_block * BLOCK_M, start, rows, columns, hidden_strides, head_strides, widths, gate_weights,
        has_tiny + row_block * n, n, HORNER, TMA, SPECIALIZED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y = tl.load(target + rows).to(tl.int32)
    a = tl.load(coefficient_a + rows)
    b = tl.load(coefficient_b + rows)
    c = tl.load(coefficient_c + rows)
    dead = (a == 0) & (b == 0) & (c == 0)
    dz = a[:, None] * tl.exp(z - tl.load(row_max + rows)[:, None]) - c[:, None]
    dz = dz - tl.where(column[None, :] == (y - start)[:, None], b[:, None], 0.0)
    dz = tl.where(dead[:, None], 0.0, dz)
    at = (gradient + rows * gradient_stride + (start - begin))[:, None] + column[None, :]
    tl.store(at, dz.to(gradient.dtype.element_ty), mask=(row < N)[:, None] & (column < end - start)[None, :])
