"""Matrix products with a wide accumulator: 16-bit operands are never rounded to 16 bits on the way.

CUDA's vendor GEMM writes fp32 from 16-bit operands directly. The CPU's does not, so there 16-bit operands are upcast,
the large one a block at a time: no second copy of a head ever exists.
"""

from __future__ import annotations

from torch import Tensor, addmm

UPCAST_BLOCK = 4096  # vocabulary rows of a head converted at once on the CPU


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """out (M, P) = alpha a (M, K) b (K, P), plus out if ``add``; operands are no wider than ``out``."""
    beta = 1 if add else 0
    if a.dtype == b.dtype == out.dtype:
        if not add and out.device.type == "cpu":
            out.zero_()  # MKL multiplies what is there by beta in a pass of its own, which takes longer
            beta = 1
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif out.is_cuda:
        addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        _accumulate_upcast(out, a.to(out.dtype), b, beta, alpha)


def _accumulate_upcast(out: Tensor, a: Tensor, b: Tensor, beta: int, alpha: float) -> None:
    inner, outer = b.shape
    if outer >= inner:
        for start in range(0, outer, UPCAST_BLOCK):
            block = slice(start, start + UPCAST_BLOCK)
            out[:, block].addmm_(a, b[:, block].to(out.dtype), beta=beta, alpha=alpha)
    else:
        for start in range(0, inner, UPCAST_BLOCK):
            block = slice(start, start + UPCAST_BLOCK)
            out.addmm_(a[:, block], b[block].to(out.dtype), beta=beta if start == 0 else 1, alpha=alpha)
