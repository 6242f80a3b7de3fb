"""Matrix products with a wide accumulator: 16-bit operands are never rounded to 16 bits on the way.

CUDA's vendor GEMM writes fp32 from 16-bit operands directly. The CPU's does not, so there 16-bit operands are upcast,
the large one a block at a time: no second copy of a head ever exists.

PyTorch's products in fp32 on x86 are MKL's, whose kernels on an AMD processor with AVX-512 are half as wide. There
larger ones are oneDNN's, which PyTorch has, too: 220 to 250 GFLOP/s where MKL does 95 to 110.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import torch
from torch import Tensor, addmm

UPCAST_BLOCK = 4096  # vocabulary rows of a head converted at once on the CPU
ONEDNN_FROM = 1 << 24  # multiplications: oneDNN takes half a millisecond to compile a product of a new shape


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of a (..., K) and b (K, P), without gradients."""
    if _is_onednns(a, b):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return found
    return a @ b


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """out (M, P) = alpha a (M, K) b (K, P), plus out if ``add``; operands are no wider than ``out``."""
    beta = 1 if add else 0
    if alpha == 1.0 and out.dtype == a.dtype and _is_onednns(a, b):
        if add:
            out.add_(product(a, b))
        else:
            out.copy_(product(a, b))
    elif a.dtype == b.dtype == out.dtype:
        if not add and out.device.type == "cpu":
            out.zero_()  # MKL multiplies what is there by beta in a pass of its own, which takes longer
            beta = 1
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif out.is_cuda:
        addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        _accumulate_upcast(out, a.to(out.dtype), b, beta, alpha)


def _is_onednns(a: Tensor, b: Tensor) -> bool:
    fits = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return fits and a.numel() * b.shape[1] >= ONEDNN_FROM and _mkl_is_narrow()


@functools.cache
def _mkl_is_narrow() -> bool:
    """Whether this processor has AVX-512 and MKL no kernels of that width for it."""
    torch_has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if torch_has_both and torch.backends.cpu.get_cpu_capability() == "AVX512":
        with contextlib.suppress(OSError):
            return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


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
