"""The operators of elementwise.py on a GPU: one Triton kernel each, which reads and writes every number once.

They are as fast as memory is, so blocks are chosen for it. A row, or what a program takes of it, lies in the registers
of as many warps as give every thread 8 or 16 neighbouring numbers, which for 16-bit types are whole vectors of 16
bytes. Rows may lie anywhere as long as the numbers within one are neighbours. There are no atomics: the same inputs
give the same bits.
"""

# What a kernel takes is typed by Triton's compiler.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The norm's blocks: numbers per program, in several rows where a row has fewer, and per thread. The backward keeps sums
# for every column: at 32 per thread that takes 128 registers in 16-bit types, and a multiprocessor has room for two
# programs of 8192, of which one computes while the other waits for memory.
FORWARD, BACKWARD = (2048, 16), (8192, 32)
PROGRAMS = 264  # that share the rows: two for each of an H100's 132 multiprocessors, each leaving one row of sums
MAX_WARPS = 16
SWIGLU_BLOCK = 1024  # columns per program; 8 per thread
PAIRS = 1024  # of heads' numbers per program; 8 per thread
FUSION = {"enable_fp_fusion": True}  # of products and sums; the default is another one in every version


@triton.jit
def wide(x):
    """In the type that is computed in."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit(do_not_specialize=["rows"])  # token counts change with every batch
def rms_norm_forward_kernel(
    x,  # (rows, width)
    weight,  # (width,)
    y,  # (rows, width) out
    rstd,  # (rows,) out, fp32
    rows,
    width,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = wide(tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0))
    r = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(rstd + row, r, mask=row < rows)
    w = wide(tl.load(weight + column, mask=column < width, other=0.0))
    normed = wide((value * r[:, None]).to(y.dtype.element_ty))
    tl.store(y + row[:, None] * width + column[None, :], (normed * w[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy,  # (rows, width)
    x,  # (rows, width)
    weight,  # (width,)
    rstd,  # (rows,) fp32
    dx,  # (rows, width) out
    partial_dw,  # (programs, width) fp32 out
    rows,
    width,
    dy_stride,
    x_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx, and of every program's rows the sum of dy n."""
    column = tl.arange(0, BLOCK)
    dw = tl.zeros((ROWS, BLOCK), rstd.dtype.element_ty)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        g = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        normed = wide(value) * r[:, None]
        dw += wide(g) * normed
        w = tl.load(weight + column, mask=column < width, other=0.0)  # again: fewer registers, and it is in the cache
        g = wide(g) * wide(w)[None, :]
        along = tl.sum(g * normed, 1) / width
        result = (g - normed * along[:, None]) * r[:, None]
        tl.store(dx + row[:, None] * width + column[None, :], result.to(dx.dtype.element_ty), mask=inside)
    place = partial_dw + tl.program_id(0).to(tl.int64) * width
    tl.store(place + column, tl.sum(dw, 0), mask=column < width)


@triton.jit
def swiglu_forward_kernel(x, y, width, x_stride, BLOCK: tl.constexpr):
    """x (rows, 2 width), y (rows, width) out."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = wide(tl.load(x + row * x_stride + column, mask=inside, other=0.0))
    b = wide(tl.load(x + row * x_stride + width + column, mask=inside, other=0.0))
    silu = wide((a / (1.0 + tl.exp(-a))).to(y.dtype.element_ty))
    tl.store(y + row * width + column, (silu * b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(dy, x, dx, width, dy_stride, x_stride, BLOCK: tl.constexpr):
    """dy (rows, width), x and dx (rows, 2 width), dx out."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = wide(tl.load(x + row * x_stride + column, mask=inside, other=0.0))
    b = wide(tl.load(x + row * x_stride + width + column, mask=inside, other=0.0))
    g = wide(tl.load(dy + row * dy_stride + column, mask=inside, other=0.0))
    narrow = dx.dtype.element_ty
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    silu = wide((a / (1.0 + tl.exp(-a))).to(narrow))
    da = wide((g * b).to(narrow)) * sigmoid * (1.0 + a * (1.0 - sigmoid))
    out = dx + row * 2 * width + column
    tl.store(out, da.to(narrow), mask=inside)
    tl.store(out + width, (g * silu).to(narrow), mask=inside)


@triton.jit
def turn_pair(first, second, c, s, narrow: tl.constexpr):
    """(first, second) turned by the angle of cosine c and sine s, rounded to the type ``narrow``."""
    to_first = (wide((first * c).to(narrow)) - second * s).to(narrow)
    to_second = (wide((second * c).to(narrow)) + first * s).to(narrow)
    return to_first, to_second


@triton.jit
def store_pair(at, first, second, half, inside):
    tl.store(at, first, mask=inside)
    tl.store(at + half, second, mask=inside)


@triton.jit
def rotated_heads_forward_kernel(
    mixed,  # (T, groups, each, 2 half): of every group its queries, its key, its value
    cos,  # (T, half)
    sin,  # (T, half)
    q,  # (T, groups, each - 2, 2 half) out
    k,  # (T, groups, 2 half) out
    v,  # (T, groups, 2 half) out
    groups,
    each,
    half,
    mixed_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """HEADS of a token's heads, wherever they belong."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    real, inside = pair < half, (head < groups * each)[:, None] & (pair < half)[None, :]
    c = wide(tl.load(cos + token * half + pair, mask=real, other=0.0))[None, :]
    s = wide(tl.load(sin + token * half + pair, mask=real, other=0.0))[None, :]
    at = mixed + token * mixed_stride + head[:, None] * (2 * half) + pair[None, :]
    first = wide(tl.load(at, mask=inside, other=0.0))
    second = wide(tl.load(at + half, mask=inside, other=0.0))
    narrow = q.dtype.element_ty
    to_first, to_second = turn_pair(first, second, c, s, narrow)
    group, queries = head // each, each - 2
    place = head - group * each
    row = token * groups + group
    query = (row * queries + place)[:, None] * (2 * half) + pair[None, :]
    one = row[:, None] * (2 * half) + pair[None, :]
    store_pair(q + query, to_first, to_second, half, inside & (place < queries)[:, None])
    store_pair(k + one, to_first, to_second, half, inside & (place == queries)[:, None])
    store_pair(v + one, first.to(narrow), second.to(narrow), half, inside & (place > queries)[:, None])


@triton.jit
def load_half(dq, dk, dv, at_q, at_k, at_v, is_q, is_k, is_v):
    """Of every head one half, from where it is; one of the three is."""
    found = wide(tl.load(dq + at_q, mask=is_q, other=0.0))
    found += wide(tl.load(dk + at_k, mask=is_k, other=0.0))
    return found + wide(tl.load(dv + at_v, mask=is_v, other=0.0))


@triton.jit
def rotated_heads_backward_kernel(
    dq,  # (T, groups (each - 2), 2 half)
    dk,  # (T, groups, 2 half)
    dv,  # (T, groups, 2 half)
    cos,  # (T, half)
    sin,  # (T, half)
    mixed,  # (T, groups, each, 2 half) out
    groups,
    each,
    half,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    real, inside = pair < half, (head < groups * each)[:, None] & (pair < half)[None, :]
    c = wide(tl.load(cos + token * half + pair, mask=real, other=0.0))[None, :]
    s = wide(tl.load(sin + token * half + pair, mask=real, other=0.0))[None, :]
    group, queries = head // each, each - 2
    place = head - group * each
    at_q = token * q_token_stride + (group * queries + place)[:, None] * q_head_stride + pair[None, :]
    at_k = token * k_token_stride + group[:, None] * k_head_stride + pair[None, :]
    at_v = token * v_token_stride + group[:, None] * v_head_stride + pair[None, :]
    is_v = (place > queries)[:, None]
    of_q, of_k, of_v = inside & (place < queries)[:, None], inside & (place == queries)[:, None], inside & is_v
    first = load_half(dq, dk, dv, at_q, at_k, at_v, of_q, of_k, of_v)
    second = load_half(dq, dk, dv, at_q + half, at_k + half, at_v + half, of_q, of_k, of_v)
    narrow = mixed.dtype.element_ty
    to_first, to_second = turn_pair(first, second, c, -s, narrow)
    out = mixed + (token * groups * each + head)[:, None] * (2 * half) + pair[None, :]
    to_first, to_second = tl.where(is_v, first.to(narrow), to_first), tl.where(is_v, second.to(narrow), to_second)
    store_pair(out, to_first, to_second, half, inside)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    matrix = _matrix(x)
    rows, width = matrix.shape
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=_statistics_dtype(x))
    block, block_rows, warps = norm_tile(width, *FORWARD)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rms_norm_forward_kernel[(triton.cdiv(rows, block_rows),)](
            matrix, weight, y, rstd, rows, width, matrix.stride(0), eps,
            ROWS=block_rows, BLOCK=block, num_warps=warps, **FUSION,
        )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    upstream, matrix = _matrix(dy), _matrix(x)
    rows, width = matrix.shape
    dx = x.new_empty(x.shape)
    block, block_rows, warps = norm_tile(width, *BACKWARD)
    programs = min(PROGRAMS, triton.cdiv(rows, block_rows))
    partial_dw = rstd.new_empty((programs, width))
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            upstream, matrix, weight, rstd, dx, partial_dw, rows, width, upstream.stride(0), matrix.stride(0),
            ROWS=block_rows, BLOCK=block, num_warps=warps, **FUSION,
        )  # fmt: skip
    return dx, partial_dw.sum(0).to(weight.dtype)


def norm_tile(width: int, numbers: int, per_thread: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of a program for rows of ``width``."""
    block = triton.next_power_of_2(width)
    rows = max(1, numbers // block)
    return block, rows, min(MAX_WARPS, rows * block // (32 * per_thread))


def swiglu_forward(x: Tensor) -> Tensor:
    matrix = _matrix(x)
    rows, width = matrix.shape[0], matrix.shape[1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    block = min(SWIGLU_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        swiglu_forward_kernel[(rows, triton.cdiv(width, block))](
            matrix, y, width, matrix.stride(0), BLOCK=block, **FUSION
        )
    return y


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    upstream, matrix = _matrix(dy), _matrix(x)
    rows, width = upstream.shape
    dx = x.new_empty(x.shape)
    block = min(SWIGLU_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(x):
        swiglu_backward_kernel[(rows, triton.cdiv(width, block))](
            upstream, matrix, dx, width, upstream.stride(0), matrix.stride(0), BLOCK=block, **FUSION
        )
    return dx


def rotated_heads_forward(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = _matrix(mixed)
    tokens, half = len(matrix), cos.shape[-1]
    heads = matrix.shape[1] // (2 * half)
    q, k, v = (mixed.new_empty((tokens, part, 2 * half)) for part in (heads - 2 * groups, groups, groups))
    block, padded = heads_tile(heads, half)
    with torch.cuda.device_of(mixed):
        rotated_heads_forward_kernel[(tokens, triton.cdiv(heads, block))](
            matrix, cos.contiguous(), sin.contiguous(), q, k, v, groups, heads // groups, half, matrix.stride(0),
            HEADS=block, HALF=padded, **FUSION,
        )  # fmt: skip
    return q, k, v


def rotated_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    (tokens, groups, width), heads = dk.shape, dq.shape[1] + 2 * dk.shape[1]
    mixed = dq.new_empty((tokens, heads * width))
    block, padded = heads_tile(heads, width // 2)
    with torch.cuda.device_of(dq):
        rotated_heads_backward_kernel[(tokens, triton.cdiv(heads, block))](
            dq, dk, dv, cos.contiguous(), sin.contiguous(), mixed, groups, heads // groups, width // 2,
            dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            HEADS=block, HALF=padded, **FUSION,
        )  # fmt: skip
    return mixed


def heads_tile(heads: int, half: int) -> tuple[int, int]:
    """(heads, pairs of each) of a program for a token's ``heads``: queries, keys and values."""
    padded = triton.next_power_of_2(half)
    return min(triton.next_power_of_2(heads), max(1, PAIRS // padded)), padded


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _matrix(x: Tensor) -> Tensor:
    """(rows, width) of x (..., width), in place where its rows are equally far apart."""
    matrix = x.flatten(0, -2)
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
