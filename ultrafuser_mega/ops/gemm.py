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
ONEDNN_FROM = 1 << 24  # multiplications
ONEDNN_TO = 1 << 22  # numbers of the first operand or of what is written: oneDNN makes copies of them
ONEDNN_STEP = 64  # of tokens


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of a (..., K) and b (K, P), without gradients."""
    if b.dim() == 2 and a.numel():
        rows = a.reshape(-1, a.shape[-1])
        if part := _onednns_part(rows, b):
            out = rows.new_empty((len(rows), b.shape[1]))
            _accumulate_by_onednn(out, rows, b, part, add=False)
            return out.view(*a.shape[:-1], b.shape[1])
    return a @ b


def accumulate(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """out (M, P) = alpha a (M, K) b (K, P), plus out if ``add``; operands are no wider than ``out``."""
    beta = 1 if add else 0
    if alpha == 1.0 and out.dtype == a.dtype and (part := _onednns_part(a, b)):
        _accumulate_by_onednn(out, a, b, part, add=add)
    elif a.dtype == b.dtype == out.dtype:
        if not add and out.device.type == "cpu":
            out.zero_()  # MKL multiplies what is there by beta in a pass of its own, which takes longer
            beta = 1
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif out.is_cuda:
        addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        _accumulate_upcast(out, a.to(out.dtype), b, beta, alpha)


def _onednns_part(a: Tensor, b: Tensor) -> tuple[int, int] | None:
    """How many rows and summands are oneDNN's, from the first; None: the product stays with MKL.

    OneDNN compiles and keeps a program for every shape, and numbers of tokens differ from one microbatch to the next.
    Tokens are what lies one behind another in ``a``: its rows, or the summands of a gradient's product.
    """
    if a.device.type != "cpu" or not a.dtype == b.dtype == torch.float32 or not _mkl_is_narrow():
        return None
    rows, summands = a.shape
    if a.stride(0) == 1:
        summands -= summands % ONEDNN_STEP
    else:
        rows -= rows % ONEDNN_STEP
    columns = b.shape[1]
    worth_it = rows * summands * columns >= ONEDNN_FROM and rows * max(summands, columns) <= ONEDNN_TO
    return (rows, summands) if worth_it else None


def _accumulate_by_onednn(out: Tensor, a: Tensor, b: Tensor, part: tuple[int, int], *, add: bool) -> None:
    rows, summands = part
    found = torch.ops.mkldnn._linear_pointwise(a[:rows, :summands], b[:summands].t(), None, "none", [], "")
    if add:
        out[:rows].add_(found)
    else:
        out[:rows].copy_(found)
    if summands < len(b):
        out.addmm_(a[:, summands:], b[summands:])
    if rows < len(a):
        accumulate(out[rows:], a[rows:], b, add=add)


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
