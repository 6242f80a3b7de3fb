"""The loss's Triton kernels as a GPU would get them, up to the driver: Triton's own launch path specialises, compiles
and is stopped where it would call CUDA. Tensors lie in the CPU's memory; nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from support.scripts import script

CAPABILITY = 90
SHARED_BYTES = 227 << 10  # that one program may have there


@dataclass(frozen=True)
class Launch:
    kernel: str
    programs: int
    shared_bytes: int
    descriptor_bytes: int


class Gpu:
    """What Triton asks of a driver, for a GPU that is not there."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.utils = GPUTarget("cuda", CAPABILITY, 32), self
        self.launches: list[Launch] = []
        self.launcher_cls = lambda source, metadata: self._launcher(metadata)

    def _launcher(self, metadata: Any):
        def launch(programs: int, _y: int, _z: int, *_rest: object) -> None:
            found = Launch(metadata.name, programs, metadata.shared, metadata.global_scratch_size)
            self.launches.append(found)

        return launch

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, *_arguments: object) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, _module: int) -> None:
        pass


@cache
def gpu_of_this_process() -> Gpu:
    """One: compiled kernels keep the launcher they came with."""
    return Gpu()


def launches(widths: tuple[int, ...], rows: int, vocab: int) -> list[Launch]:
    """Of every kernel in tools/benchmarks/tune_kernels.py, called as the loss calls it, with bf16 operands."""
    from benchmark import Shape
    from triton.runtime import driver

    from ultrafuser_mega.ops import streaming_tiles

    tuner = script("tune_kernels")
    gpu = gpu_of_this_process()
    gpu.launches.clear()
    driver.set_active(gpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming_tiles, "capability", lambda _tensor: CAPABILITY)
        for call in tuner.kernel_calls(Shape(rows, vocab, widths, torch.bfloat16), torch.device("cpu")).values():
            call()
    return gpu.launches


KERNELS = {"statistics_kernel", "gate_statistics_kernel", "dlogits_kernel", "row_statistics_kernel"}
KERNELS |= {"mixture_statistics_kernel"}


@pytest.mark.parametrize("widths", [(64, 128, 96), (33, 50, 1)], ids=["aligned", "unaligned"])
def test_every_kernel_is_launched_within_the_memory_of_its_gpu(widths, compiling):
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


def test_another_number_of_tokens_compiles_nothing(compiling):
    assert len(set(compiling(compilations, [300, 304, 1, 4097]))) == 1
