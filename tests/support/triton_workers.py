"""Worker processes in which Triton interprets kernels, or compiles them: it decides at import, once per process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from gpu_arithmetic import teach_gpu_arithmetic


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Any]:
    """Calls a function in a process whose Triton interprets kernels on CPU tensors."""
    with _worker(interpret=True) as worker:
        worker.submit(teach_gpu_arithmetic).result()
        yield lambda function, *args: worker.submit(function, *args).result()


@pytest.fixture(scope="session")
def compiling() -> Iterator[Any]:
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
