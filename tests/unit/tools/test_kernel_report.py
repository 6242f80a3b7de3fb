"""Every Triton and CUDA kernel compiled ahead of time for three GPU generations, held to what makes it fast."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


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
        assert kernel.local_bytes == 0, kernel
        if kernel.kernel.startswith("streaming"):
            assert kernel.tensor_core.get(tensor_core, 0) > 0, kernel
            assert (kernel.tma_loads > 0) == (capability >= 90), kernel


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
