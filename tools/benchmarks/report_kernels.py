"""Print what the compilers made of every Triton and CUDA kernel, per GPU generation; needs no GPU.

The CUDA kernels of csrc/ are listed where nvcc is found.

    python tools/benchmarks/report_kernels.py [--capability 80 90 100] [--dtype bf16]
    python tools/benchmarks/report_kernels.py --loops --capability 90 --specialists 1 2 3 4 [--out FILE.json]

The second form lists the loops over k of the streaming backend's kernels instead: as they are, with the gate's weights
by Horner's rule in the accumulator, and with them multiplied into the operands in registers. A step is one trip through
a loop, BLOCK_K numbers of k, as a warp issues it; "registers" or "shared memory" is where the left operand comes from.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernel_report import CAPABILITIES, Resources, cuda_report, report, streaming_report
from main_loops import MainLoop
from scripting import Parser, positive, result_file, write_json

WEIGHTS = {"in the operands": False, "Horner": True}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=list(CAPABILITIES))
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--specialists", type=positive, nargs="+", default=[3])
    parser.add_argument("--loops", action="store_true", help="of the streaming backend")
    parser.add_argument("--out", type=result_file, help="JSON file, of the loops")
    arguments = parser.parse_args()
    if arguments.loops:
        loops(arguments.capability, arguments.dtype, arguments.specialists, arguments.out)
        return
    print(f"{'kernel':52} {'sm':>4} {'registers':>9} {'shared B':>9} {'local B':>8} {'TMA':>4}  tensor cores")
    for capability in arguments.capability:
        for specialists in arguments.specialists:
            for resources in report(capability, arguments.dtype, specialists):
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


def loops(capabilities: list[int], dtype: str, counts: list[int], out: Path | None) -> None:
    records: list[dict[str, Any]] = []
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what is compiled already takes no time
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"])
    numbers = f"{'registers':>9} {'shared B':>8} {'local B':>7} {'compiled':>8}"
    print(f"{'kernel':28} {'sm':>3} {'n':>2} {'weights':15} {numbers}")
    for capability in capabilities:
        for specialists in counts:
            for weights, horner in WEIGHTS.items():
                for r in streaming_report(capability, dtype, specialists, HORNER=horner):
                    if r.kernel == "streaming: gate statistics" and horner:
                        continue  # weighs whole logits
                    print(f"{r.kernel:28} {r.capability:3} {specialists:2} {weights:15} {r.registers:9} "
                          f"{r.shared_bytes:8} {r.local_bytes:7} {r.seconds:6.1f} s", flush=True)  # fmt: skip
                    for loop in r.loops:
                        print(f"    {described(loop)}")
                    records.append({"specialists": specialists, "dtype": dtype, "weights": weights} | asdict(r))
            if out:
                write_json(out, {"kernels": records})


def described(loop: MainLoop) -> str:
    source = "registers" if loop.from_registers else "shared memory"
    return (
        f"{loop.instructions:4} instructions a step, {loop.products} x {loop.form} from {source}, "
        f"{loop.barriers} barriers, {loop.multiplications} multiplications, {loop.local_accesses} spilled"
    )


if __name__ == "__main__":
    main()
