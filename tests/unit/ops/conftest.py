"""Worker processes in which Triton interprets kernels, or compiles them: it decides at import, once per process."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def interpreted():
    """Calls a function in a process whose Triton interprets kernels on CPU tensors."""
    with _worker(interpret=True) as worker:
        worker.submit(_teach_bf16).result()
        yield lambda function, *args: worker.submit(function, *args).result()


def _teach_bf16() -> None:
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


@pytest.fixture(scope="session")
def compiling():
    """Calls a function in a process whose Triton compiles."""
    with _worker(interpret=False) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


def _worker(interpret: bool) -> ProcessPoolExecutor:
    pytest.importorskip("triton")
    worker = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", str(int(interpret)))
        worker.submit(torch.set_num_threads, 1).result()  # the process starts here and inherits the variable
    return worker
