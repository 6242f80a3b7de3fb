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
    - puts its own operations in the place of the language's anew for every function that a kernel calls, which takes a
      third of the time; here where they are not in place yet.
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

    put_in_place = interpreter._patch_lang

    def put_in_place_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return put_in_place(function)
        return None  # the outermost call's, which alone is asked to undo it, is never here

    builder.create_dot = product
    builder.cast_impl = rounded
    interpreter._patch_lang = put_in_place_once


def _wide(data: np.ndarray, bf16: bool) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32) if bf16 else data.astype(np.float32)


def in_order(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start (M, P) + a (M, K) b (K, P) in fp32, every element added up from the first k to the last."""
    total = start.astype(np.float32)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return total
