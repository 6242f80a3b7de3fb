"""What only a GPU can answer about how the loss's kernels are built: each question a few calls that take turns.

    python tools/benchmarks/kernel_questions.py [--tokens 8192 --vocab 32000 --width 5120] [--out FILE.json]

    products  what the vendor's product loses where it writes fp32 instead of bf16, and where it adds to what is there
    copies    dz into the gradients' memory: between rows that are apart 2 and 8 bytes at a time, and in one piece
    weights   streaming's kernels as they are, with a weight of next to 0 in every block of rows, and with operands
              that are scaled in registers one by one
    L2        whether the small tile of "gate statistics" waits for operands: its rate beside that of "statistics"

--device cpu asks those that need no kernels of Triton's, on a size that takes a moment, to show that the script works.
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

from ultrafuser_mega.ops import gemm, parked_dlogits
from ultrafuser_mega.ops.problem import checked_problem

SPECIALISTS, ROUNDS = 3, 7
Calls = dict[str, tuple[Callable[[], object], float]]  # by name: what to call, and its FLOPs or bytes


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=5120, help="of each of three specialists")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    shape = Shape(arguments.tokens, arguments.vocab, (arguments.width,) * SPECIALISTS, torch.bfloat16)
    if arguments.device == "cpu":
        shape = Shape(64, 512, (64,) * SPECIALISTS, torch.bfloat16)
    device = torch.device(arguments.device)
    questions: list[tuple[str, str, Callable[[Shape, torch.device], Calls]]] = [
        ("products", "TFLOP/s", products),
        ("copies", "GB/s", copies),
    ]
    if device.type == "cuda":
        questions += [("weights and L2", "TFLOP/s", streaming_kernels)]
    records: list[dict[str, Any]] = []
    for name, unit, question in questions:
        for what, found in timed(question(shape, device), device).items():
            record = {"question": name, "what": what, "unit": unit} | found
            record["rate"] = found["work"] / found["ms"] / (1e9 if unit == "TFLOP/s" else 1e6)
            records.append(record)
            print(f"{name:15} {what:45} {record['ms']:9.3f} ms {record['rate']:8.1f} {unit}", flush=True)
        if arguments.out:
            write_json(arguments.out, {"questions": records})


def timed(calls: Calls, device: torch.device) -> dict[str, dict[str, float]]:
    """Medians of rounds in which all of them take turns."""
    for call, _ in calls.values():
        call()  # compiles
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (call, _) in calls.items():
            times[name].append(seconds_on_gpu(call) if device.type == "cuda" else seconds(call))
    return {name: {"ms": statistics.median(times[name]) * 1e3, "work": work} for name, (_, work) in calls.items()}


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def products(shape: Shape, device: torch.device) -> Calls:
    """One specialist's logits of half the tokens, as a chunk has them."""
    rows, width = max(1, shape.tokens // 2), shape.widths[0]
    x, head = (torch.randn(n, width, device=device).to(shape.dtype) for n in (rows, shape.vocab))
    narrow = torch.empty(rows, shape.vocab, dtype=shape.dtype, device=device)
    wide = torch.empty(rows, shape.vocab, device=device)
    flops = 2.0 * rows * shape.vocab * width
    return {
        "bf16 out": (lambda: torch.mm(x, head.t(), out=narrow), flops),
        "fp32 out": (lambda: gemm.accumulate(wide, x, head.t(), add=False), flops),
        "fp32 out, added to what is there": (lambda: gemm.accumulate(wide, x, head.t(), add=True), flops),
    }


def copies(shape: Shape, device: torch.device) -> Calls:
    """A block of the vocabulary of a chunk's dz, whose rows begin where fp32 rows did, to its place and back."""
    rows, columns = max(1, shape.tokens // 2), max(4, min(shape.vocab, 4096) // 4 * 4)
    pitch = -(-shape.vocab // 64) * 64
    dz = torch.zeros(rows, pitch, device=device).view(shape.dtype)[:, :columns]  # 16-bit rows, 2 pitch apart
    place = torch.empty(rows, columns, dtype=shape.dtype, device=device)
    whole, moved = torch.empty_like(place), 2.0 * place.numel() * place.element_size()
    return {
        "2 bytes at a time": (lambda: place.copy_(dz), moved),
        "8 bytes at a time": (lambda: parked_dlogits.copy_rows(place, dz), moved),
        "in one piece": (lambda: whole.copy_(place), moved),
    }


def streaming_kernels(shape: Shape, device: torch.device) -> Calls:
    from stored_tiles import weighing
    from tune_kernels import kernel_calls

    from ultrafuser_mega.ops import streaming

    calls = kernel_calls(shape, device)
    inputs = Inputs(shape, device)
    problem = checked_problem(
        inputs.hidden, inputs.heads, inputs.gate_logits, inputs.target, group=None, vocab_start=0, vocab_size=None,
        ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0,
    )  # fmt: skip
    tiny = inputs.gate_logits.detach().clone()
    tiny[::64] = torch.tensor([0.0, -100.0, -100.0], device=device)  # in every block of rows, of all but the first
    detour = replace(problem, gate_logits=tiny)
    flops = shape.flops(1)

    def in_registers() -> None:
        with weighing(False):
            calls["statistics"]()

    def with_tiny_weights() -> None:
        streaming.statistics(detour, streaming.gate_softmax(detour), per_specialist=False)

    return {
        "statistics, weights in the accumulator": (calls["statistics"], flops),
        "statistics, the detour in every block": (with_tiny_weights, flops),
        "statistics, operands scaled in registers": (in_registers, flops),
        "gate statistics, a tile of 128 x 64": (calls["gate statistics"], flops),
    }


if __name__ == "__main__":
    main()
