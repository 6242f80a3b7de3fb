"""Which kernels the loss spends its time in: one profiler trace of every backend and task, and tables.

    python tools/benchmarks/profile_loss.py --device cuda --trace trace_loss.json.gz --out FILE.json

The trace holds one call of each, one after the other, on the goal's shape; the tables are one per backend and task. On
a CPU the shape shrinks to one that takes a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import torch
from benchmark import TASKS, Inputs, Shape
from profiling import Trace, traced
from scripting import Parser, result_file, write_json

SHAPES = {"cuda": Shape(8192, 32000, (5120,) * 3, torch.bfloat16), "cpu": Shape(64, 500, (32,) * 3, torch.float32)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trace", type=Path, help="compressed trace, .json.gz")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    device = torch.device(arguments.device)
    inputs = Inputs(SHAPES[arguments.device], device)
    tables: dict[str, Any] = {}
    calls: list[Callable[[], object]] = []
    for task in ("train", "gate_only"):
        for backend in benchmark.BACKENDS[task] + (benchmark.GPU_BACKENDS if device.type == "cuda" else ()):
            call = prepared(inputs, backend, task)
            call()  # compiles
            tables[f"{task}, {backend}"] = traced(call, device, None)
            calls.append(call)
            if arguments.out:
                write_json(arguments.out, {"operators": tables})
    for name, rows in tables.items():
        print(f"\n{name}")
        for row in rows[:8]:
            print(f"  {row['own_ms']:9.3f} ms {row['calls']:6} x  {row['name']}")
    if arguments.trace:
        trace = Trace(device, arguments.trace)
        trace.begin()
        for call in calls:
            call()
        trace.end()


def prepared(inputs: Inputs, backend: str, task: str) -> Callable[[], object]:
    step = benchmark.step(inputs, benchmark.ours(backend), task)

    def call() -> object:
        inputs.drop_gradients()
        inputs.require(TASKS[task][0])
        return step()

    return call


if __name__ == "__main__":
    main()
