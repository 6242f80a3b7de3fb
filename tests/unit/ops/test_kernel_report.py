"""Every Triton kernel compiled ahead of time for three GPU generations, and held to what makes it fast."""

from __future__ import annotations

import pytest


def resources(capability: int) -> list:
    from ultrafuser_mega.ops.kernel_report import report

    return report(capability)


@pytest.mark.parametrize(("capability", "tensor_core"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_kernels_compile_spill_nothing_and_use_the_tensor_cores(capability, tensor_core, compiling):
    kernels = compiling(resources, capability)
    assert {kernel.kernel.split(":")[0] for kernel in kernels} == {"chunked", "gate_only", "streaming"}
    for kernel in kernels:
        assert kernel.local_bytes == 0, kernel
        if kernel.kernel.startswith("streaming"):
            assert kernel.tensor_core.get(tensor_core, 0) > 0, kernel
