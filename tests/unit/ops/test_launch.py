"""The loss's Triton kernels as a GPU would get them, up to the driver: Triton's own launch path specialises, compiles
and is stopped where it would call CUDA. Tensors lie in the CPU's memory; nothing reads them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.scripts import script

if TYPE_CHECKING:
    from absent_gpu import AbsentGpu, Launch

CAPABILITY = 90
SHARED_BYTES = 227 << 10  # that one program may have there


@cache
def gpu_of_this_process() -> AbsentGpu:
    """One: compiled kernels keep the launcher they came with."""
    from absent_gpu import AbsentGpu

    return AbsentGpu(CAPABILITY)


def launches(widths: tuple[int, ...], rows: int, vocab: int) -> list[Launch]:
    """Of every kernel in tools/benchmarks/tune_kernels.py, called as the loss calls it, with bf16 operands."""
    from benchmark import Shape

    tuner = script("tune_kernels")
    gpu = gpu_of_this_process()
    gpu.launches.clear()
    gpu.stand_in()
    for call in tuner.kernel_calls(Shape(rows, vocab, widths, torch.bfloat16), torch.device("cpu")).values():
        call()
    return gpu.launches


KERNELS = {"statistics_kernel", "gate_statistics_kernel", "dlogits_kernel", "row_statistics_kernel"}
KERNELS |= {"mixture_statistics_kernel", "mixture_dlogits_kernel"}


@pytest.mark.parametrize("widths", [(64, 128, 96), (33, 50, 1)], ids=["aligned", "unaligned"])
def test_every_kernel_is_launched_within_the_memory_of_its_gpu(widths: Any, compiling: Any) -> None:
    found = compiling(launches, widths, 300, 1000)
    assert {launch.kernel for launch in found} == KERNELS
    for launch in found:
        assert launch.programs > 0 and launch.shared_bytes <= SHARED_BYTES, launch
    described = {launch.kernel for launch in found if launch.descriptor_bytes}
    streaming = {"statistics_kernel", "gate_statistics_kernel", "dlogits_kernel"}
    assert described == (streaming if widths == (64, 128, 96) else set())


def compilations(row_counts: list[int]) -> list[int]:
    """Kernels compiled so far after the loss of so many rows each."""
    from ultrafuser_mega.ops import streaming_kernels

    counts = []
    for rows in row_counts:
        launches((64, 128, 96), rows, 1000)
        counts.append(sum(len(cache[0]) for cache in streaming_kernels.statistics_kernel.device_caches.values()))
    return counts


def test_another_number_of_tokens_compiles_nothing(compiling: Any) -> None:
    assert len(set(compiling(compilations, [300, 304, 1, 4097]))) == 1
