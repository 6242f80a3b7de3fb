"""Benchmark the mixture cross-entropy: speed and peak memory of every backend, its floor and its peers, in one run.

    python tools/benchmarks/bench_mixture_ce.py --device cpu --preset nano --out docs/benchmarks/cpu.json

Tasks: `forward` (no gradients), `gate_only` (stage 1: hidden states and heads frozen), `train` (everything).
`bare GEMMs` are the matrix products no exact implementation avoids; every ratio refers to them, to plain PyTorch or to
`one GEMM` (plain PyTorch over concatenated inputs and heads), measured in the same rounds. Beside wall time the records
hold the process's own CPU time, which survives neighbours better. Peers that are not installed, or cannot do what is
asked, are listed as absent with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import benchmark
import torch
from benchmark import FLOOR, ONE_GEMM, PLAIN, TASKS, Inputs, Result, Shape
from scripting import Parser, positive, result_file, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, Any]  # what was measured of one shape, as it stands in the JSON file

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


SWEPT_SIZE: dict[str, Callable[[Run], int]] = {
    "tokens": lambda run: run["tokens"],
    "vocab": lambda run: run["vocab"],
    "specialists": lambda run: len(run["widths"]),
}
RATIOS = {"ratio_to_floor": FLOOR, "ratio_to_plain": PLAIN, "ratio_to_one_gemm": ONE_GEMM}
LEAST = {"tokens": 4, "vocab": 8}  # what a sweep can still divide
VARIANTS = list(dict.fromkeys([*sum(benchmark.BACKENDS.values(), ()), *benchmark.GPU_BACKENDS, *benchmark.PEERS]))


def main() -> None:
    arguments = parse_arguments()
    shape = PRESETS[arguments.preset]
    shape = replace(shape, tokens=arguments.tokens or shape.tokens, vocab=arguments.vocab or shape.vocab)
    runs: list[Run] = []
    report = {"machine": machine(arguments), "shards": arguments.vocab_shards, "runs": runs}
    for one in SWEEPS[arguments.sweep](shape) if arguments.sweep else [shape]:
        if arguments.vocab_shards > 1:
            from ultrafuser_mega.runtime.spawn import run_ranks

            ranks = run_ranks(run_shard, arguments.vocab_shards, one, arguments, timeout_s=3600.0)
            runs.append(slowest(ranks))
        else:
            runs.append({})
            for runs[-1] in run_shape(one, arguments):
                if arguments.out:
                    write_json(arguments.out, report)  # a benchmark that is cut short leaves the tasks it finished
        print_table(runs[-1])
    if arguments.out:
        write_json(arguments.out, report)
        print(f"wrote {arguments.out}")
    if arguments.plot:
        figure = sweep_figure(runs, arguments.sweep) if arguments.sweep else shape_figure(runs[0])
        write_figure(arguments.plot, figure)
        print(f"wrote {arguments.plot}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: llama2-13b on a GPU, nano on a CPU")
    parser.add_argument("--tokens", type=positive, help="instead of the preset's")
    parser.add_argument("--vocab", type=positive, help="instead of the preset's")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all; may be repeated")
    parser.add_argument("--repeats", type=positive, help="rounds; default 20 on a GPU, 5 on a CPU")
    parser.add_argument("--skip", choices=VARIANTS, action="append", default=[], help="a variant to leave out")
    parser.add_argument("--sweep", choices=SWEEPS, help="repeat while one size grows")
    parser.add_argument("--vocab-shards", type=positive, default=1, help="spread the vocabulary over so many CPU ranks")
    parser.add_argument("--out", type=result_file, help="JSON file")
    parser.add_argument(
        "--plot", type=result_file, nargs="?", const="bench_mixture_ce.png", help="PNG, SVG or PDF; default %(const)s"
    )
    arguments = parser.parse_args()
    arguments.preset = arguments.preset or ("llama2-13b" if arguments.device == "cuda" else "nano")
    arguments.repeats = arguments.repeats or (20 if arguments.device == "cuda" else 5)
    arguments.task = arguments.task or list(TASKS)
    if refusal := what_does_not_fit(arguments):
        parser.error(refusal)
    return arguments


def what_does_not_fit(arguments: argparse.Namespace) -> str:
    """Of arguments that are fine one by one: what is wrong with them here or together; "" if nothing is."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "argument --device: cuda: PyTorch finds no CUDA device; use cpu"
    if arguments.vocab_shards > 1 and arguments.device == "cuda":
        return f"argument --vocab-shards: {arguments.vocab_shards}: the ranks are gloo's, so it needs --device cpu"
    if repeated := next((task for task in arguments.task if arguments.task.count(task) > 1), None):
        return f"argument --task: {repeated}: given more than once; name each task once"
    least, size = LEAST.get(arguments.sweep, 1), getattr(arguments, str(arguments.sweep), None)
    if size is not None and size < least:
        return f"argument --{arguments.sweep}: {size}: --sweep {arguments.sweep} divides it; needed at least {least}"
    return what_cannot_be_plotted(arguments.plot) if arguments.plot else ""


def what_cannot_be_plotted(path: Path) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"argument --plot: {path}: needs matplotlib, which is not installed; pip install matplotlib"
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() in known:
        return ""
    return f"argument --plot: {path}: matplotlib writes no {path.suffix or 'file without a suffix'}; use .png"


def run_shape(shape: Shape, arguments: argparse.Namespace, shard: int = 0) -> Iterator[Run]:
    """Every variant on one shape: the report so far, after each task."""
    inputs = Inputs(shape, torch.device(arguments.device), shard, arguments.vocab_shards)
    absent: dict[str, str] = {}
    peers = {}
    for name, build in benchmark.PEERS.items():
        if name in arguments.skip:
            continue
        if arguments.vocab_shards > 1 and name in benchmark.NOT_IN_SHARDS:
            absent[name] = f"not in shards: {benchmark.NOT_IN_SHARDS[name]}"
            continue
        try:
            peers[name] = build()
        except ImportError as error:
            absent[name] = str(error)
    results = []
    for task in arguments.task:
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


def run_shard(rank: int, shape: Shape, arguments: argparse.Namespace) -> Run:
    return list(run_shape(shape, arguments, shard=rank))[-1]


def slowest(ranks: list[Run]) -> Run:
    """Of several ranks' reports: every variant as its slowest rank saw it, with the most memory that any rank took."""
    report = dict(ranks[0])
    report["results"] = []
    for same in zip(*(rank["results"] for rank in ranks), strict=True):
        memory = max(same, key=lambda record: record["peak_extra_bytes"])
        report["results"].append(
            max(same, key=lambda record: record["median_s"])
            | {name: memory[name] for name in ("peak_extra_bytes", "gradient_bytes")}
        )
    add_ratios(report["results"])
    return report


def as_record(result: Result, shape: Shape) -> dict[str, Any]:
    passes = TASKS[result.task][1]
    return {
        "task": result.task,
        "variant": result.variant,
        "median_s": result.median,
        "min_s": min(result.seconds),
        "seconds": result.seconds,
        "median_cpu_s": statistics.median(result.cpu_seconds),
        "tflops": shape.flops(passes) / result.median / 1e12,
        "peak_extra_bytes": result.peak_extra_bytes,
        "gradient_bytes": result.gradient_bytes,
    }


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Ratios of medians to RATIOS' variants of the same task; None where that was not measured."""
    for record in results:
        for key, variant in RATIOS.items():
            other = next((r for r in results if r["task"] == record["task"] and r["variant"] == variant), None)
            record[key] = record["median_s"] / other["median_s"] if other else None


def print_table(run: Run) -> None:
    print(f"\n{run['tokens']} tokens, vocabulary {run['vocab']}, hidden {run['widths']}, {run['dtype']}")
    columns = ("ms", "x floor", "x plain", "x one GEMM", "TFLOP/s", "peak MiB", "- grads")
    print(f"{'task':10} {'variant':18}" + "".join(f"{column:>11}" for column in columns))
    for r in run["results"]:
        ratios = [f"{r[key]:.2f}" if r[key] else "" for key in RATIOS]
        memory = [
            f"{r['peak_extra_bytes'] / 2**20:.0f}",
            f"{(r['peak_extra_bytes'] - r['gradient_bytes']) / 2**20:.0f}",
        ]
        if r["variant"] == FLOOR:
            memory = ["", ""]
        cells = [f"{r['median_s'] * 1e3:.2f}", *ratios, f"{r['tflops']:.2f}", *memory]
        print(f"{r['task']:10} {r['variant']:18}" + "".join(f"{cell:>11}" for cell in cells))
    for name, reason in run["absent"].items():
        print(f"absent: {name} ({reason})")


def shape_figure(run: Run) -> Figure:
    """Bars: every task and variant's time over the floor."""
    from matplotlib.figure import Figure

    records = [r for r in run["results"] if r["variant"] != FLOOR]
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(records)), layout="tight")
    panel = figure.subplots()
    labels = [f"{r['task']}: {r['variant']}" for r in records]
    panel.barh(labels[::-1], [r["ratio_to_floor"] for r in records][::-1], color="#4477aa")
    panel.axvline(1.0, color="black", linewidth=1)
    panel.set_xlabel("time relative to the bare GEMMs")
    panel.set_title(f"{run['tokens']} tokens, vocabulary {run['vocab']}, hidden {run['widths']}, {run['dtype']}")
    return figure


def sweep_figure(runs: list[Run], sweep: str) -> Figure:
    """Lines: how each variant's time grows with the swept size; one panel per task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(r["task"] for run in runs for r in run["results"]))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="tight")
    panels: list[Any] = list(figure.subplots(1, len(tasks), squeeze=False)[0])
    for panel, task in zip(panels, tasks, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for run in runs:
            for r in run["results"]:
                if r["task"] == task:
                    lines.setdefault(r["variant"], []).append((SWEPT_SIZE[sweep](run), r["median_s"] * 1e3))
        for variant, points in lines.items():
            color = "black" if variant == FLOOR else f"C{VARIANTS.index(variant)}"  # the same in every panel
            panel.plot(*zip(*points, strict=True), marker="o", label=variant, color=color)
        panel.set(title=task, xlabel=sweep, ylabel="ms", xlim=(0, None), ylim=(0, None))
        panel.legend(fontsize="small")
    return figure


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is measured on, with what, and when."""
    on_gpu = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_model(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads() if arguments.vocab_shards == 1 else 1,  # run_ranks gives each rank one
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout this file is in, with "-dirty" behind it if files differ; None where there is none."""
    root = Path(__file__).resolve().parents[2]
    return output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def output_of(*command: str) -> str | None:
    """First line that ``command`` prints, or None if it is not there or fails."""
    above = str(Path(__file__).resolve().parents[3])  # not the commit of a repository this folder merely lies in
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": above},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


if __name__ == "__main__":
    main()
