"""Time the Triton kernels of the loss in a handful of shapes on the GPU at hand, and say which belong into the tables.

    python tools/benchmarks/tune_kernels.py [--tokens 8192 --vocab 32000 --width 5120] [--out FILE.json]

The tables are streaming_tiles.TILES, epilogue_triton.STEPS (BLOCK, warps) and forward.BLOCK_COLUMNS. The fastest comes
first, the entry in use is marked; a candidate that does not compile or launch is listed with its reason. Results are
written after every kernel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from benchmark import Inputs, Shape, seconds_on_gpu
from scripting import Parser, positive, result_file, write_json

from ultrafuser_mega.ops import epilogue_triton, forward, gate_only, streaming
from ultrafuser_mega.ops.problem import Problem, checked_problem
from ultrafuser_mega.ops.streaming_tiles import TILES, Tile, capability, generation

SPECIALISTS = 3
ROUNDS = 5
ROW_MAX = 40.0  # above every logit of the benchmark's inputs, whose standard deviation is 3
GATE_BLOCKS = "gate_only: columns of a block"
CANDIDATES: dict[str, list[Any]] = {
    "statistics": [
        Tile(128, 256, 64, 8, 4, tma=True, halves=True), Tile(128, 256, 64, 8, 4, tma=True),
        Tile(128, 256, 128, 8, 2, tma=True, halves=True),
        Tile(256, 128, 64, 8, 4, tma=True, halves=True), Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 128, 64, 8, 4, tma=True, specialized=True), Tile(128, 256, 64, 8, 4, tma=True, specialized=True),
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 4, halves=True), Tile(64, 128, 64, 4, 4),
    ],
    "gate statistics": [
        Tile(128, 64, 64, 8, 4, tma=True), Tile(64, 128, 64, 8, 3, tma=True), Tile(128, 64, 128, 8, 2, tma=True),
        Tile(64, 64, 64, 8, 4, tma=True, specialized=True), Tile(64, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4, tma=True),
    ],
    "dlogits": [
        Tile(128, 256, 64, 8, 3, tma=True), Tile(256, 128, 64, 8, 4, tma=True), Tile(128, 128, 64, 8, 4, tma=True),
        Tile(128, 256, 128, 8, 2, tma=True),
        Tile(128, 128, 64, 8, 4, tma=True, specialized=True), Tile(128, 256, 64, 8, 4, tma=True, specialized=True),
        Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3),
    ],
    "chunked: row statistics": [(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8, 16)],
    "chunked: dlogits": [(block, warps) for block in (2048, 4096, 8192) for warps in (4, 8, 16)],
    "chunked: mixture statistics": [(block, warps) for block in (512, 1024, 2048) for warps in (4, 8)],
    "chunked: mixture dlogits": [(block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8)],
    GATE_BLOCKS: [2048, 4096, 8192, 16384, 32768],
}  # fmt: skip


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=5120, help="of each of three specialists")
    parser.add_argument("--kernel", choices=CANDIDATES, action="append", help="default: all; may be repeated")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels: no CUDA device; run this on a machine with a GPU")
    shape = Shape(arguments.tokens, arguments.vocab, (arguments.width,) * SPECIALISTS, torch.bfloat16)
    calls = kernel_calls(shape, torch.device("cuda"))
    here = capability(torch.empty(0, device="cuda"))
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": {}}
    for name in arguments.kernel or CANDIDATES:
        table, key = table_of(name, here)
        found = tune(calls[name], table, key, [table[key], *CANDIDATES[name]])
        report["kernels"][name] = found
        print(f"\n{name}")
        for record in found:
            mark = "  in use" if record["in_use"] else ""
            print(f"  {record['config']!s:24} {record.get('ms', record.get('failed'))}{mark}")
        if arguments.out:
            write_json(arguments.out, report)


def table_of(name: str, compute_capability: int) -> tuple[dict[Any, Any], Any]:
    """The table that holds a kernel's entry for such a GPU, and under which key."""
    if name == GATE_BLOCKS:
        return forward.BLOCK_COLUMNS, "cuda"
    if name.startswith("chunked: "):
        return epilogue_triton.STEPS, name.removeprefix("chunked: ")
    return TILES[name], generation(compute_capability)


def kernel_calls(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every kernel by its name in CANDIDATES, as the loss calls it."""
    inputs = Inputs(shape, device)
    problem = checked_problem(
        inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target, group=None, vocab_start=0, vocab_size=None,
        ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    gate_training = replace(problem, gate_logits=inputs.gate_logits.clone().requires_grad_())
    gate_weights = streaming.gate_softmax(problem)
    ones = torch.ones(shape.tokens, device=device)
    dlogits = streaming.Dlogits(problem, gate_weights, ROW_MAX * ones, (ones, ones, 0 * ones))
    block = slice(0, min(streaming.Blocks.of(problem).columns, shape.vocab))
    dz = inputs.hidden[0].new_empty((shape.tokens, block.stop))
    return {
        "statistics": lambda: streaming.statistics(problem, gate_weights, per_specialist=False),
        "gate statistics": lambda: streaming.statistics(problem, gate_weights, per_specialist=True),
        "dlogits": lambda: dlogits.write(slice(0, shape.tokens), block, dz),
        GATE_BLOCKS: lambda: gate_only.mixture_loss(gate_training),
    } | epilogue_calls(problem, gate_weights)


def epilogue_calls(problem: Problem, gate_weights: torch.Tensor) -> dict[str, Callable[[], object]]:
    """On chunks as large as those of the chunked backend."""
    epilogue = epilogue_triton.TritonEpilogue(problem.hidden[0].dtype)
    chunk = min(problem.rows, 2048)
    logits = torch.randn(chunk, problem.real_rows, device=gate_weights.device)
    planes = torch.randn(len(problem.hidden), chunk, min(problem.real_rows, 8192), device=gate_weights.device)
    target, weights = problem.target[:chunk], gate_weights[:chunk]
    ones = torch.ones(chunk, device=gate_weights.device)
    return {
        "chunked: row statistics": lambda: epilogue.statistics(logits, target, keep=True),
        "chunked: dlogits": lambda: epilogue.dlogits(logits, None, target, ones, (ones, ones, 0 * ones)),
        "chunked: mixture statistics": lambda: epilogue.mixture_statistics(planes, weights, target),
        "chunked: mixture dlogits": lambda: epilogue.mixture_dlogits(
            planes, weights, target, ones, (ones, ones, 0 * ones)
        ),
    }


def tune(call: Callable[[], object], table: dict[Any, Any], key: Any, candidates: list[Any]) -> list[dict[str, Any]]:
    """One record per candidate, the fastest first, those that fail last; the table is left as it was."""
    before = table[key]
    records: list[dict[str, Any]] = []
    for config in dict.fromkeys(candidates):
        table[key] = config
        record = {"config": config, "in_use": config == before}
        try:
            records.append(record | timed(call))
        except Exception as error:  # whatever Triton makes of a shape that does not fit
            records.append(record | {"failed": (str(error).splitlines() or [type(error).__name__])[0][:200]})
        finally:
            table[key] = before
    return sorted(records, key=lambda record: record.get("ms", float("inf")))


def timed(call: Callable[[], object]) -> dict[str, float]:
    """``ms``, the median; ``first_call_s``: seconds rather than milliseconds where Triton had to compile."""
    begun = time.perf_counter()
    call()
    first_call_s = time.perf_counter() - begun
    call()
    times = [seconds_on_gpu(call) * 1e3 for _ in range(ROUNDS)]
    return {"ms": statistics.median(times), "first_call_s": first_call_s}


if __name__ == "__main__":
    main()
