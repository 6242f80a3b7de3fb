"""Triton's interpreter, taught what a GPU does with bf16."""

from __future__ import annotations

import numpy as np
import torch


def teach_bf16() -> None:
    """The interpreter keeps bf16 numbers as 16-bit integers, multiplies those, and cuts where a GPU rounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    product, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(self, source, kind):
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, kind)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)

    builder.create_dot = lambda self, a, b, *rest: product(self, widened(a), widened(b), *rest)
    builder.cast_impl = rounded
