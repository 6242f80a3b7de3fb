"""Make of the JSON that tools/gpu_check.sh leaves the tables that people read, and hold it to the project's bars.

    python tools/benchmarks/gpu_report.py docs/benchmarks/nvidia_h100_80gb_hbm3.json

Writes the file's namesake with the suffix .md beside it: what was measured on, how the steps ended, values and the toy
run, the bars with met, MISSED or not measured, one table per shape, the trainer beside a plain script, where the time
goes, the kernels of the gate and of a decoder layer, the fastest tiles. Works on whatever part of a run there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench_mixture_ce import PRESETS
from benchmark import FLOOR, ONE_GEMM, PEERS, PLAIN, Shape
from gpu_report_steps import (
    beside_plain,
    layer_kernels,
    machine_rows,
    operators,
    questions,
    saving,
    toy,
    values,
    warmed,
)
from markdown_lines import section, table
from scripting import Parser, write_text

from ultrafuser_mega.errors import InputError

# Plain PyTorch takes one product and some 100 bytes per logit: at 13B, 790 TFLOP/s and 3.0 TB/s 1.9 times the product.
GATE_ALONE_BESIDE_PEERS = 1.6
BAR_SHAPES = {  # the bars are stated for these, on an H100
    "llama2-13b": PRESETS["llama2-13b"],
    "llama2-13b, an eighth": replace(PRESETS["llama2-13b"], vocab=4000),
    "llama3-8b": PRESETS["llama3-8b"],
    "llama3-8b, an eighth": replace(PRESETS["llama3-8b"], vocab=16032),
}
GATE_SHAPES = ("llama2-13b", "llama3-8b")  # of tools/benchmarks/bench_gate_scale.py
GATE_ONLY = ("gate_only", "streaming")  # the better of them counts
TIMED_OUT = (124, 137)  # exit codes of timeout(1)
MIB = 1 << 20


class Bar(NamedTuple):
    shape: str
    what: str
    bound: str
    measured: str  # "" if it was not
    met: bool
    note: str = ""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="JSON of tools/gpu_check.sh")
    path = parser.parse_args().file
    out = path.with_suffix(".md")
    try:
        write_text(out, "\n".join(lines(loaded(path), path.name)) + "\n")
    except (InputError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {out}")


def loaded(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the JSON that tools/gpu_check.sh left") from None
    except ValueError:
        raise InputError(f"{path}: is not JSON; name the file that tools/gpu_check.sh left") from None
    if not isinstance(report, dict) or "steps" not in report or not all(isinstance(v, dict) for v in report.values()):
        raise InputError(f"{path}: has no 'steps'; name the file that tools/gpu_check.sh left")
    return report


def lines(report: dict[str, Any], name: str) -> Iterator[str]:
    runs = benchmark_runs(report)
    machine: dict[str, Any] = next((part["machine"] for part in report.values() if "machine" in part), {})
    yield f"# {machine.get('device', Path(name).stem)}"
    yield ""
    yield f"Made by tools/benchmarks/gpu_report.py from {name}, which tools/gpu_check.sh left."
    yield ""
    yield from table(("measured on", ""), machine_rows(machine, report.get("versions", {})))
    yield from section("Steps")
    yield from table(
        ("step", "seconds", "outcome"),
        [(name, str(step.get("seconds", "")), outcome(step)) for name, step in report["steps"].items()],
    )
    yield from values(report.get("values", {}))
    yield from toy(report.get("toy", {}))
    yield from section("Bars")
    yield "Stated for an H100, bf16 and 8192 tokens. Every ratio compares medians of the same interleaved rounds."
    yield ""
    bars = [bar for shape in BAR_SHAPES for bar in bars_of(shape, runs)] + gate_kernel_bars(report)
    yield from table(
        ("shape", "what", "bar", "measured", "", "note"),
        [(b.shape, b.what, b.bound, b.measured, verdict(b), b.note) for b in bars],
    )
    for run in runs:
        yield from section(f"{run['part']}: {title(run)}")
        yield from table(
            (
                *("task", "variant", "ms", "x floor", f"x {PLAIN}", f"x {ONE_GEMM}", "x best peer"),
                *("TFLOP/s", "peak MiB", "beyond gradients MiB"),
            ),
            [variant_row(r, run) for r in run["results"]],
        )
        yield ""
        for peer, reason in absent_peers(run).items():
            yield f"- absent: {peer} ({reason})"
        failed = {name: reason for name, reason in run["absent"].items() if name not in PEERS}
        yield from (f"- failed: {name} ({reason})" for name, reason in failed.items())
    yield from questions(report.get("questions", {}))
    yield from beside_plain(report.get("beside_plain", {}))
    yield from operators("The loss", report.get("loss_profile", {}).get("operators", {}))
    if records := report.get("gate_kernels", {}).get("results"):
        yield from section("The gate's kernels beside a copy of as many bytes")
        numbers = [(f"{r['median_us']:.1f}", f"{r['gb_per_s']:.0f}", f"{r['of_copy']:.1%}") for r in records]
        names = [(r["shape"], r["direction"], r["variant"]) for r in records]
        rows = [name + row for name, row in zip(names, numbers, strict=True)]
        yield from table(("shape", "direction", "variant", "us", "GB/s", "of copy"), rows)
    yield from layer_kernels(report.get("layer_kernels", {}))
    if kernels := report.get("tiles", {}).get("kernels"):
        yield from section("The fastest tile of each kernel")
        yield "Streaming: block_m, block_n, block_k, warps, stages, tma, specialized, halves; chunked: block, warps."
        yield ""
        yield from table(("kernel", "fastest", "ms", "in use", "ms", "failed"), map(tile_row, kernels.items()))
    yield from saving(report.get("checkpoint", {}))
    yield from warmed(report.get("warm", {}))


def benchmark_runs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of every benchmark step that measured something, with the step's name as ``part``."""
    return [
        run | {"part": name}
        for name, part in report.items()
        for run in part.get("runs", [])
        if run.get("results")
    ]  # fmt: skip


def title(run: dict[str, Any]) -> str:
    return f"{run['tokens']} tokens, vocabulary {run['vocab']}, hidden {run['widths']}, {run['dtype']}"


def variant_row(record: dict[str, Any], run: dict[str, Any]) -> tuple[str, ...]:
    task = record["task"]
    beside_all = (fastest(run, task, (PLAIN,)), fastest(run, task, (ONE_GEMM,)), best_peer(run, task))
    memory = (record["peak_extra_bytes"], record["peak_extra_bytes"] - record["gradient_bytes"])
    return (
        record["task"],
        record["variant"],
        f"{record['median_s'] * 1e3:.2f}",
        f"{record['ratio_to_floor']:.2f}",
        *(f"{record['median_s'] / beside['median_s']:.2f}" if beside else "" for beside in beside_all),
        f"{record['tflops']:.1f}",
        *(["", ""] if record["variant"] == FLOOR else [f"{size / MIB:.0f}" for size in memory]),
    )


def absent_peers(run: dict[str, Any]) -> dict[str, str]:
    """Peers that no task of ``run`` tried: why."""
    tried = {r["variant"] for r in run["results"]} | {name.partition(": ")[2] for name in run["absent"]}
    return {peer: run["absent"].get(peer, "left out of this run") for peer in PEERS if peer not in tried}


def best_peer(run: dict[str, Any], task: str) -> dict[str, Any] | None:
    return fastest(run, task, tuple(PEERS))


def fastest(run: dict[str, Any], task: str, variants: tuple[str, ...]) -> dict[str, Any] | None:
    found = [r for r in run["results"] if r["task"] == task and r["variant"] in variants]
    return min(found, key=lambda r: r["median_s"], default=None)


def of_shape(run: dict[str, Any], shape: Shape) -> bool:
    found = (run["tokens"], run["vocab"], tuple(run["widths"]), run["dtype"])
    return found == (shape.tokens, shape.vocab, shape.widths, str(shape.dtype).removeprefix("torch."))


def bars_of(name: str, all_runs: list[dict[str, Any]]) -> Iterator[Bar]:
    """The bars of one shape; where several runs measured it, the worst of them counts."""
    runs = [run for run in all_runs if of_shape(run, BAR_SHAPES[name])]
    yield over_floor(name, runs, "train", ("chunked",), 1.15)
    beside, note = beside_peers(runs, "train", ("chunked",))
    yield Bar(name, "train, chunked: best peer's time / its own", "> 1", ratio(beside), above(beside, 1.0), note)
    for variant, mib in (("chunked", 1024), ("streaming", 64)):
        yield workspace(name, runs, variant, mib)
    yield over_floor(name, runs, "gate_only", GATE_ONLY, 1.2)
    beside, note = beside_peers(runs, "gate_only", GATE_ONLY)
    yield Bar(
        name,
        "gate_only, the better backend: best peer's time / its own",
        f">= {GATE_ALONE_BESIDE_PEERS}",
        ratio(beside),
        above(beside, GATE_ALONE_BESIDE_PEERS, True),
        note,
    )
    yield over_floor(name, runs, "forward", ("streaming",), 1.25)


def over_floor(shape: str, runs: list[dict[str, Any]], task: str, variants: tuple[str, ...], bound: float) -> Bar:
    found = [r["ratio_to_floor"] for run in runs if (r := fastest(run, task, variants))]
    what = f"{task}, {variants[0] if len(variants) == 1 else 'the better backend'}: x bare GEMMs"
    measured = f"{max(found):.2f}" if found else ""
    return Bar(
        shape,
        what,
        f"<= {bound}",
        measured,
        bool(found) and all(value <= bound for value in found),
        failures(runs, task, variants),
    )


def workspace(shape: str, runs: list[dict[str, Any]], variant: str, bound_mib: int) -> Bar:
    records = [r for run in runs if (r := fastest(run, "train", (variant,)))]
    found = [(r["peak_extra_bytes"] - r["gradient_bytes"]) / MIB for r in records]
    what, measured = f"train, {variant}: MiB beyond gradients", f"{max(found):.1f}" if found else ""
    met = bool(found) and all(value <= bound_mib for value in found)
    return Bar(shape, what, f"<= {bound_mib}", measured, met, failures(runs, "train", (variant,)))


def failures(runs: list[dict[str, Any]], task: str, variants: tuple[str, ...]) -> str:
    """Which of ``variants`` a run tried and could not measure."""
    names = [f"{task}: {variant}" for variant in variants]
    return "; ".join(
        f"{name} failed ({run['absent'][name]})" for run in runs for name in names if name in run["absent"]
    )


def above(found: list[float], bound: float, or_equal: bool = False) -> bool:
    return bool(found) and all(value > bound or (or_equal and value == bound) for value in found)


def ratio(found: list[float]) -> str:
    return f"{min(found):.2f}" if found else ""


def beside_peers(runs: list[dict[str, Any]], task: str, variants: tuple[str, ...]) -> tuple[list[float], str]:
    """Per run the best peer's time over ours, and which peers no run could set beside it."""
    pairs = [(fastest(run, task, variants), best_peer(run, task)) for run in runs]
    found = [peer["median_s"] / mine["median_s"] for mine, peer in pairs if mine and peer]
    present = {r["variant"] for run in runs for r in run["results"] if r["task"] == task}
    missing = [peer for peer in PEERS if peer not in present]
    return found, f"absent: {', '.join(missing)}" if runs and missing else ""


def gate_kernel_bars(report: dict[str, Any]) -> list[Bar]:
    records = report.get("gate_kernels", {}).get("results", [])
    bars = []
    for shape in GATE_SHAPES:
        for direction in ("forward", "backward"):
            wanted = (shape, direction, "kernel")
            found = [r["of_copy"] for r in records if (r["shape"], r["direction"], r["variant"]) == wanted]
            measured = f"{found[0]:.1%}" if found else ""
            what = f"gate kernel, {direction}: of a copy's bandwidth"
            bars.append(Bar(shape, what, ">= 85 %", measured, above(found, 0.85, True)))
    return bars


def verdict(bar: Bar) -> str:
    if not bar.measured:
        return "not measured"
    return "met" if bar.met else "**MISSED**"


def tile_row(item: tuple[str, list[dict[str, Any]]]) -> tuple[str, ...]:
    """The tuner's records of one kernel, which come the fastest first."""
    name, records = item
    timed = [r for r in records if "ms" in r]
    used = next((r for r in records if r["in_use"]), None)
    return name, *config_and_ms(next(iter(timed), None)), *config_and_ms(used), str(len(records) - len(timed))


def config_and_ms(record: dict[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "", ""
    return str(record["config"]), f"{record['ms']:.3f}" if "ms" in record else "failed"


def outcome(step: dict[str, Any]) -> str:
    if "missing" in step:
        return f"**MISSING**: {step['missing']} is not installed"
    if "exit_code" not in step:
        return "left out: no time"
    code = step["exit_code"]
    text = "done" if code == 0 else "ran into its limit" if code in TIMED_OUT else f"FAILED with exit code {code}"
    return f"{text}; its result cannot be read" if step.get("unreadable") else text


if __name__ == "__main__":
    main()
