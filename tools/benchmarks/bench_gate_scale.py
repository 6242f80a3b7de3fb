"""How close the gate's kernels come to copying memory:  python tools/benchmarks/bench_gate_scale.py [--out FILE.json]

Both kernels and a copy of the same number of bytes take turns in one run; medians of 50 rounds. The target is 85 % of
the copy's bandwidth. The plain PyTorch twin stands beside them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from benchmark import seconds_on_gpu

from ultrafuser_mega.ops import gate_scale_cuda, gate_scale_torch

ROUNDS = 50
SHAPES = {  # rows of a chunk, widths, type
    "llama2-13b": (4096, (5120,) * 3, torch.bfloat16),
    "llama3-8b": (1664, (4096,) * 3, torch.bfloat16),
    "ragged": (4096, (5120, 4096, 3584), torch.bfloat16),
    "fp32": (4096, (4096,) * 3, torch.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gate_scale: no CUDA device")
    built = gate_scale_cuda.serves(torch.device("cuda"), torch.float32, 1)
    if not built:
        print("the CUDA extension is not built: the twin alone is measured")
    records = [record for name in SHAPES for record in measure(name, built)]
    print(f"{'shape':12} {'direction':10} {'variant':8} {'us':>9} {'GB/s':>8} {'of copy':>8}")
    for r in records:
        print(
            f"{r['shape']:12} {r['direction']:10} {r['variant']:8} {r['median_us']:9.1f} {r['gb_per_s']:8.0f}"
            f" {r['of_copy']:8.1%}"
        )
    if arguments.out:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": records}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {arguments.out}")


def measure(name: str, built: bool) -> list[dict[str, Any]]:
    rows, widths, dtype = SHAPES[name]
    gate_logits = torch.randn(rows, len(widths), device="cuda")
    kept = torch.ones(rows, dtype=torch.bool, device="cuda")
    hidden = [torch.randn(rows, d, device="cuda").to(dtype) for d in widths]
    d_inputs = [torch.randn(rows, d, device="cuda") for d in widths]
    d_hidden = [torch.empty_like(states) for states in hidden]
    d_gate = torch.empty_like(gate_logits)
    gate_weights = torch.softmax(gate_logits, 1)
    numbers, size = rows * sum(widths), dtype.itemsize
    moved = {"forward": numbers * 2 * size, "backward": numbers * (2 * size + 4)}  # bytes read and written

    def scale(code: ModuleType) -> Callable[[], object]:
        return lambda: code.scale_inputs(gate_logits, kept, hidden, dtype)

    def unscale(code: ModuleType) -> Callable[[], object]:
        return lambda: code.unscale_gradients(gate_weights, kept, hidden, d_inputs, d_hidden, d_gate)

    twins = {"kernel": gate_scale_cuda, "twin": gate_scale_torch} if built else {"twin": gate_scale_torch}
    made_of = {"forward": scale, "backward": unscale}
    records: list[dict[str, Any]] = []
    for direction, total in moved.items():
        calls = {"copy": copy_of(total // 2)}
        calls |= {variant: made_of[direction](code) for variant, code in twins.items()}
        medians = interleaved(calls)
        records += [
            {
                "shape": name,
                "direction": direction,
                "variant": variant,
                "median_us": seconds * 1e6,
                "gb_per_s": total / seconds / 1e9,
                "of_copy": medians["copy"] / seconds,
            }
            for variant, seconds in medians.items()
        ]
    return records


def copy_of(size: int) -> Callable[[], object]:
    """Copies so many bytes: reads and writes them."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in rounds; every call finds the L2 cache full of something else."""
    other = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(ROUNDS + 3):
        for name, call in calls.items():
            other.zero_()
            taken = seconds_on_gpu(call)
            if round_number >= 3:  # warm
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
