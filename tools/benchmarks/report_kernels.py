"""Print what the compilers made of every Triton and CUDA kernel, per GPU generation; needs no GPU.

The CUDA kernels of csrc/ are listed where nvcc is found.

    python tools/benchmarks/report_kernels.py [--capability 80 90 100] [--dtype bf16]
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kernel_report import CAPABILITIES, Resources, cuda_report, report
from scripting import Parser


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    print(f"{'kernel':52} {'sm':>4} {'registers':>9} {'shared B':>9} {'local B':>8} {'TMA':>4}  tensor cores")
    for capability in arguments.capability:
        for resources in report(capability, arguments.dtype):
            show(resources)
    if nvcc := shutil.which("nvcc"):
        source = Path(__file__).parents[2] / "csrc" / "gate_kernels.cu"
        for resources in cuda_report(nvcc, source, arguments.capability):
            show(resources)
    else:
        print("no nvcc on PATH: the CUDA kernels are not listed")


def show(r: Resources) -> None:
    cores = ", ".join(f"{name} x{count}" for name, count in sorted(r.tensor_core.items())) or "-"
    tma = r.tma_loads or "-"
    print(f"{r.kernel:52} {r.capability:4} {r.registers:9} {r.shared_bytes:9} {r.local_bytes:8} {tma:>4}  {cores}")


if __name__ == "__main__":
    main()
