"""Every Triton and CUDA kernel compiled ahead of time for three GPU generations, held to what makes it fast."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

SHARED_BYTES = 227 << 10  # that one program may have on 9.0; more on 10.0
# Bytes that a thread may leave in memory while its program is in the loops over k: a few instructions per tile of
# hundreds of steps of a hundred and more each.
OUTSIDE_LOOPS = {("streaming: statistics", 80): 128, ("streaming: statistics", 90): 32}


def resources(capability: int, dtype: str, specialists: int) -> list[Any]:
    from kernel_report import report

    return report(capability, dtype, specialists)


@pytest.mark.parametrize(
    ("capability", "dtype", "specialists", "tensor_core"),
    [
        pytest.param(80, "bf16", 3, "HMMA", marks=pytest.mark.slow),
        (90, "bf16", 3, "HGMMA"),
        pytest.param(90, "fp16", 2, "HGMMA", marks=pytest.mark.slow),
        pytest.param(100, "bf16", 3, "UTCHMMA", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_spill_nothing_and_use_the_tensor_cores(
    capability: Any, dtype: Any, specialists: Any, tensor_core: Any, compiling: Any
) -> None:
    kernels = compiling(resources, capability, dtype, specialists)
    assert {kernel.kernel.split(":")[0] for kernel in kernels} == {"chunked", "gate_only", "streaming", "layer"}
    for kernel in kernels:
        assert kernel.local_bytes <= OUTSIDE_LOOPS.get((kernel.kernel, capability), 0), kernel
        if kernel.kernel.startswith("streaming"):
            assert kernel.tensor_core.get(tensor_core, 0) > 0, kernel
            assert (kernel.tma_loads > 0) == (capability >= 90), kernel
            assert kernel.shared_bytes <= SHARED_BYTES and kernel.registers <= 255, kernel
            assert kernel.loops and all(loop.local_accesses == 0 for loop in kernel.loops), kernel
    if capability == 90:
        hopper_loops_are_lean([kernel for kernel in kernels if kernel.kernel.startswith("streaming")], specialists)


def hopper_loops_are_lean(kernels: list[Any], specialists: int) -> None:
    """Per specialist one loop that feeds operands from shared memory, and one for rows with a weight of next to 0."""
    assert len(kernels) == 3
    for kernel in kernels:
        gate = kernel.kernel == "streaming: gate statistics"
        lean = [loop for loop in kernel.loops if not loop.from_registers]
        assert len(lean) == specialists and len(kernel.loops) == specialists * (1 if gate else 2), kernel
        # z is rounded before the forward and the backward go different ways with it: 128 x 256 of 256 threads
        assert gate or kernel.rounded_products >= 128, kernel
        for loop in lean:
            assert loop.form == ("HGMMA.64x64x16" if gate else "HGMMA.64x256x16"), loop
            assert loop.per_product <= 24 and loop.barriers <= 4 and loop.multiplications == 0, loop


MACHINE_CODE = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R160, gdesc[UR24], R24 ;        /* 0x03e0 */
        /*0020*/                   LDL R1, [R2] ;
        /*0030*/              @!P0 BRA 0x10 ;                                                   /* 0xff */
        /*0040*/                   STL [R2], R1 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0060*/                   FMUL R3, R3, R4 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/               @P1 BRA P2, 0x50 ;
        /*0090*/                   FMUL R3, R3, R4 ;
        /*00a0*/              @!P0 BRA 0x40 ;
        /*00b0*/                   BRA 0xb0 ;
"""


def test_main_loops_are_the_innermost_with_tensor_core_instructions() -> None:
    from main_loops import MainLoop, main_loops

    assert main_loops(MACHINE_CODE) == [
        MainLoop(3, 1, "HGMMA.64x64x16", from_registers=1, barriers=0, multiplications=0, local_accesses=1),
        MainLoop(4, 1, "HGMMA.64x256x16", from_registers=0, barriers=1, multiplications=1, local_accesses=0),
    ]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.slow
def test_kernels_of_fp32_spill_nothing(capability: int, compiling: Any) -> None:
    for kernel in compiling(resources, capability, "fp32", 3):
        assert kernel.local_bytes == 0, kernel


def cuda_resources(nvcc: str) -> list[Any]:
    from kernel_report import cuda_report

    return cuda_report(nvcc, Path(__file__).parents[3] / "csrc" / "gate_kernels.cu")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_cuda_kernels_compile_for_every_generation_and_spill_nothing(compiling: Any) -> None:
    kernels = compiling(cuda_resources, shutil.which("nvcc"))
    forward = {f"scale_inputs_kernel<{t}>" for t in ("float", "__half", "__nv_bfloat16")}
    backward = {f"unscale_gradients_kernel<{t}, {t}>" for t in ("float", "__half", "__nv_bfloat16")}
    backward |= {f"unscale_gradients_kernel<{t}, float>" for t in ("__half", "__nv_bfloat16")}
    for capability in (80, 90, 100):
        assert {kernel.kernel for kernel in kernels if kernel.capability == capability} == forward | backward
    for kernel in kernels:
        assert kernel.local_bytes == 0, kernel
        assert kernel.registers <= 64, kernel  # 128 threads: at least 8 blocks per SM hide the memory's latency
