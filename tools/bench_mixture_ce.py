"""Benchmark the mixture cross-entropy: speed and peak memory of every backend, its floor and its peers, in one run.

    python tools/bench_mixture_ce.py --device cpu --preset nano --out docs/benchmarks/cpu.json

Tasks: `forward` (no gradients), `gate_only` (stage 1: hidden states and heads frozen), `train` (everything).
`bare GEMMs` are the matrix products no exact implementation avoids; every ratio refers to them or to plain PyTorch,
measured in the same rounds. Peers that are not installed are listed as absent.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ultrafuser_mega.ops import benchmark
from ultrafuser_mega.ops.benchmark import FLOOR, TASKS, Inputs, Result, Shape

PRESETS = {
    "llama2-13b": Shape(8192, 32000, (5120,) * 3, torch.bfloat16),
    "llama2-7b": Shape(8192, 32000, (4096,) * 3, torch.bfloat16),
    "qwen2.5-7b": Shape(8192, 152064, (3584,) * 3, torch.bfloat16),
    "llama3-8b": Shape(8192, 128256, (4096,) * 3, torch.bfloat16),
    "nano": Shape(2048, 32000, (512,) * 3, torch.float32),
}
SWEEPS = {
    "tokens": lambda shape: [replace(shape, tokens=shape.tokens * k // 4) for k in (1, 2, 4, 8)],
    "vocab": lambda shape: [replace(shape, vocab=shape.vocab * k // 8) for k in (1, 2, 4, 8)],
    "specialists": lambda shape: [replace(shape, widths=shape.widths[:1] * n) for n in (1, 2, 3, 5)],
}


def main() -> None:
    arguments = parse_arguments()
    shape = PRESETS[arguments.preset]
    if arguments.tokens:
        shape = replace(shape, tokens=arguments.tokens)
    if arguments.vocab:
        shape = replace(shape, vocab=arguments.vocab)
    shapes = SWEEPS[arguments.sweep](shape) if arguments.sweep else [shape]
    runs: list[dict] = []
    for one in shapes:
        if arguments.vocab_shards > 1:
            from ultrafuser_mega.runtime.spawn import run_ranks

            ranks = run_ranks(run_shard, arguments.vocab_shards, one, arguments, timeout_s=3600.0)
            runs.append(slowest(ranks))
        else:
            runs.append({})
            for runs[-1] in run_shape(one, arguments):
                write(runs, arguments)  # a benchmark that is cut short leaves the tasks it finished
        print_table(runs[-1])
    write(runs, arguments)
    if arguments.out:
        print(f"wrote {arguments.out}")
    if arguments.plot:
        plot(runs, arguments.plot)
        print(f"wrote {arguments.plot}")


def write(runs: list[dict], arguments: argparse.Namespace) -> None:
    if arguments.out:
        report = {"machine": machine(arguments.device), "shards": arguments.vocab_shards, "runs": runs}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: llama2-13b on a GPU, nano on a CPU")
    parser.add_argument("--tokens", type=int, help="instead of the preset's")
    parser.add_argument("--vocab", type=int, help="instead of the preset's")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all; may be repeated")
    parser.add_argument("--repeats", type=int, help="rounds; default 20 on a GPU, 5 on a CPU")
    parser.add_argument("--skip", action="append", default=[], help="leave a variant out, e.g. torch.compile")
    parser.add_argument("--sweep", choices=SWEEPS, help="repeat while one size grows")
    parser.add_argument("--vocab-shards", type=int, default=1, help="spread the vocabulary over this many CPU ranks")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file (needs matplotlib)")
    arguments = parser.parse_args()
    arguments.preset = arguments.preset or ("llama2-13b" if arguments.device == "cuda" else "nano")
    arguments.repeats = arguments.repeats or (20 if arguments.device == "cuda" else 5)
    if arguments.vocab_shards > 1 and arguments.device == "cuda":
        parser.error("--vocab-shards: spawns gloo ranks, so it needs --device cpu")
    return arguments


def run_shape(shape: Shape, arguments: argparse.Namespace, shard: int = 0) -> Iterator[dict]:
    """Every variant on one shape: the report so far, after each task."""
    inputs = Inputs(shape, torch.device(arguments.device), shard, arguments.vocab_shards)
    absent: dict[str, str] = {}
    peers = {}
    for name, build in benchmark.PEERS.items():
        if name in arguments.skip or inputs.group is not None:
            continue
        try:
            peers[name] = build()
        except ImportError as error:
            absent[name] = str(error)
    results = []
    for task in arguments.task or TASKS:
        backends = benchmark.BACKENDS[task] + (benchmark.GPU_BACKENDS if arguments.device == "cuda" else ())
        losses = {backend: benchmark.ours(backend) for backend in backends}
        chosen = {name: loss for name, loss in (losses | peers).items() if name not in arguments.skip}
        results += [as_record(r, shape) for r in benchmark.measure(inputs, task, chosen, arguments.repeats, absent)]
        add_ratios(results)
        yield {
            "tokens": shape.tokens,
            "vocab": shape.vocab,
            "widths": list(shape.widths),
            "dtype": str(shape.dtype).removeprefix("torch."),
            "results": results,
            "absent": absent,
        }


def run_shard(rank: int, shape: Shape, arguments: argparse.Namespace) -> dict:
    return list(run_shape(shape, arguments, shard=rank))[-1]


def slowest(ranks: list[dict]) -> dict:
    """Of several ranks' reports: every variant as its slowest rank saw it."""
    report = dict(ranks[0])
    per_variant = zip(*(rank["results"] for rank in ranks), strict=True)
    report["results"] = [max(same, key=lambda record: record["median_s"]) for same in per_variant]
    add_ratios(report["results"])
    return report


def as_record(result: Result, shape: Shape) -> dict:
    passes = TASKS[result.task][1]
    return {
        "task": result.task,
        "variant": result.variant,
        "median_s": result.median,
        "min_s": min(result.seconds),
        "seconds": result.seconds,
        "tflops": shape.flops(passes) / result.median / 1e12,
        "peak_extra_bytes": result.peak_extra_bytes,
        "gradient_bytes": result.gradient_bytes,
    }


def add_ratios(results: list[dict]) -> None:
    """Ratios of medians to the floor and to plain PyTorch of the same task; None where that was not measured."""
    for record in results:
        for key, variant in (("ratio_to_floor", FLOOR), ("ratio_to_plain", "plain PyTorch")):
            other = next((r for r in results if r["task"] == record["task"] and r["variant"] == variant), None)
            record[key] = record["median_s"] / other["median_s"] if other else None


def print_table(run: dict) -> None:
    print(f"\n{run['tokens']} tokens, vocabulary {run['vocab']}, hidden {run['widths']}, {run['dtype']}")
    columns = ("ms", "x floor", "x plain", "TFLOP/s", "peak MiB", "- grads")
    print(f"{'task':10} {'variant':18}" + "".join(f"{column:>10}" for column in columns))
    for r in run["results"]:
        ratios = [f"{r[key]:.2f}" if r[key] else "" for key in ("ratio_to_floor", "ratio_to_plain")]
        memory = [
            f"{r['peak_extra_bytes'] / 2**20:.0f}",
            f"{(r['peak_extra_bytes'] - r['gradient_bytes']) / 2**20:.0f}",
        ]
        if r["variant"] == FLOOR:
            memory = ["", ""]
        cells = [f"{r['median_s'] * 1e3:.2f}", *ratios, f"{r['tflops']:.2f}", *memory]
        print(f"{r['task']:10} {r['variant']:18}" + "".join(f"{cell:>10}" for cell in cells))
    for name, reason in run["absent"].items():
        print(f"absent: {name} ({reason})")


def plot(runs: list[dict], path: Path) -> None:
    """Bars of time over the floor per task; one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(runs), 1, figsize=(9, 3 * len(runs)), squeeze=False)
    for panel, run in zip(panels[:, 0], runs, strict=True):
        records = [r for r in run["results"] if r["variant"] != FLOOR]
        labels = [f"{r['task']}: {r['variant']}" for r in records]
        panel.barh(labels[::-1], [r["ratio_to_floor"] for r in records][::-1], color="#4477aa")
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_xlabel("time relative to the bare GEMMs")
        panel.set_title(f"{run['tokens']} tokens, vocabulary {run['vocab']}, hidden {run['widths']}, {run['dtype']}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
