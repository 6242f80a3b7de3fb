"""Triton's interpreter, taught what a GPU does with bf16 and in which order it adds up a product."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def teach_gpu_arithmetic() -> None:
    """For Triton in this process. As it comes, the interpreter

    - keeps bf16 numbers as 16-bit integers, multiplies those, and cuts where a GPU rounds;
    - leaves a product to NumPy's BLAS, which may give a column other bits at another place of a tile: OpenBLAS does so
      on AVX2. A GPU adds every element up along k in one order, wherever in a tile it lies. The streaming backend needs
      that, since it recomputes logits in other tiles than those it took their maximum from.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)

    def product(self: Any, a: Any, b: Any, total: Any, *_precision: Any) -> Any:
        left, right = _wide(a.data, a.dtype.scalar == tl.bfloat16), _wide(b.data, b.dtype.scalar == tl.bfloat16)
        return interpreter.TensorHandle(in_order(left, right, total.data), total.dtype.scalar)

    builder.create_dot = product
    builder.cast_impl = rounded


def _wide(data: np.ndarray, bf16: bool) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32) if bf16 else data.astype(np.float32)


def in_order(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start (M, P) + a (M, K) b (K, P) in fp32, every element added up from the first k to the last."""
    total = start.astype(np.float32)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return total
