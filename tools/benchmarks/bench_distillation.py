"""Benchmark the distillation loss: time beside its bare products and plain PyTorch, memory, and errors, in one run.

    python tools/benchmarks/bench_distillation.py --out docs/benchmarks/distillation_cpu.json

Variants take turns within every round, so that the ratios survive neighbours; beside wall time there is the process's
own CPU time. `bare products` are those that no exact implementation avoids: n of the teacher, three of the student; in
every round the faster of PyTorch's over all rows and columns at once, and the loss's own (ops/gemm.py, which on some
processors takes another library's), block by block into one small buffer. The loss keeps a workspace between calls, as
a trainer's does, but for the bytes.
Memory is counted: bytes of all tensors born in a call that live at once, the student's gradients apart. Errors are
relative to float64 on a small shape, for temperatures 0.5 to 4, with the vocabulary whole and in --shards shards.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_mixture_ce import commit, cpu_model
from peers import IGNORE, plain_distillation
from scripting import Parser, positive, result_file, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrafuser_mega.ops import Workspace, distillation_loss, gemm
from ultrafuser_mega.ops.problem import accumulate_dtype
from ultrafuser_mega.runtime.spawn import run_ranks

FLOOR, OURS, PLAIN = "bare products", "distillation_loss", "plain PyTorch"
AT_ONCE, IN_BLOCKS = f"{FLOOR} at once", f"{FLOOR} in blocks"
BARE_BLOCK = (512, 1024)  # rows, columns
KINDS = {
    "forward KL": {},
    "reverse KL": {"reverse": 1.0},
    "both, labels, T 2": {"reverse": 0.5, "labels": 0.2, "temperature": 2.0},
}
HEAD = f"{'loss':20}{'variant':25}{'s':>8}{'x bare':>8}{'x plain':>9}{'CPU x bare':>12}{'MiB beside gradients':>22}"
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
SMALL = {"tokens": 192, "vocab": 2003, "width": 96, "teachers": 3}  # of the errors


@dataclass
class Inputs:
    hidden: Tensor  # (N, d)
    head: Tensor  # (V, d)
    teacher_hidden: list[Tensor]
    teacher_heads: list[Tensor]
    gate_logits: Tensor
    target: Tensor

    @classmethod
    def drawn(cls, tokens: int, vocab: int, width: int, teachers: int, dtype: torch.dtype, device: str) -> Inputs:
        draw = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=draw) * scale).to(device, dtype)

        target = torch.randint(0, vocab, (tokens,), generator=draw)
        target[::7] = IGNORE
        heads = [normal(vocab, width, 3.0 / width**0.5) for _ in range(teachers + 1)]
        hidden = [normal(tokens, width) for _ in range(teachers + 1)]
        gate_logits = torch.randn(tokens, teachers, generator=draw).to(device)
        student = hidden[0].requires_grad_(), heads[0].requires_grad_()
        return cls(*student, hidden[1:], heads[1:], gate_logits, target.to(device))

    def call(self, function: Any, **options: Any) -> Any:
        teacher = (self.teacher_hidden, self.teacher_heads, self.gate_logits, self.target)
        return function(self.hidden, self.head, *teacher, vocab_size=options.pop("vocab_size", self.vocab), **options)

    @property
    def vocab(self) -> int:
        return self.head.shape[0]

    def step(self, function: Any, **options: Any) -> Tensor:
        """Loss and gradients, as a trainer takes them."""
        self.hidden.grad = self.head.grad = None
        loss: Tensor = self.call(function, **options).loss
        loss.backward()
        return loss.detach()

    def in_blocks(self) -> Callable[[], None]:
        """The bare products as the loss takes them, each block's logits in the same place."""
        rows, columns = BARE_BLOCK
        pitch = columns + 16 if self.hidden.device.type == "cpu" else columns  # as ops/forward.py has it
        buffer = self.hidden.new_empty((2, rows, pitch), dtype=accumulate_dtype(self.hidden.dtype))
        d_hidden, d_head = buffer.new_empty(self.hidden.shape), buffer.new_empty(self.head.shape)

        @torch.no_grad()
        def products() -> None:
            for row in range(0, len(self.hidden), rows):
                chunk = slice(row, row + rows)
                h, known = self.hidden[chunk], [states[chunk] for states in self.teacher_hidden]
                for column in range(0, self.vocab, columns):
                    block = slice(column, column + columns)
                    z, s = buffer[:, : len(h), : len(self.head[block])]
                    for j, (x, head) in enumerate(zip(known, self.teacher_heads, strict=True)):
                        gemm.accumulate(z, x, head[block].t(), add=j > 0)
                    gemm.accumulate(s, h, self.head[block].t(), add=False)
                    ds = s.to(h.dtype)
                    gemm.accumulate(d_head[block], ds.t(), h, add=row > 0)
                    gemm.accumulate(d_hidden[chunk], ds, self.head[block], add=column > 0)

        return products

    def at_once(self) -> Callable[[], None]:
        logits = self.hidden.new_empty((self.hidden.shape[0], self.vocab))
        outputs = torch.empty_like(self.hidden), torch.empty_like(self.head)

        @torch.no_grad()
        def products() -> None:
            for states, head in zip(self.teacher_hidden, self.teacher_heads, strict=True):
                torch.mm(states, head.t(), out=logits)
            torch.mm(self.hidden, self.head.t(), out=logits)
            torch.mm(logits, self.head, out=outputs[0])
            torch.mm(logits.t(), self.hidden, out=outputs[1])

        return products


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors born inside this context that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in given | self._seen:
                self._seen.add(key)
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key, tensor.untyped_storage().nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def main() -> None:
    arguments = parse_arguments()
    dtype = getattr(torch, arguments.dtype)
    sizes = (arguments.tokens, arguments.vocab, arguments.width, arguments.teachers)
    inputs = Inputs.drawn(*sizes, dtype, arguments.device)
    records = []
    print(HEAD, flush=True)
    for kind in KINDS:
        records += (found := measured(inputs, kind, arguments.repeats))
        print(*lines_of(found), sep="\n", flush=True)
    errors = all_errors(arguments.shards)
    print(*error_table(errors), sep="\n")
    if arguments.out:
        machine = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        shape = dict(zip(("tokens", "vocab", "width", "teachers"), sizes, strict=True)) | {"dtype": arguments.dtype}
        report = {"machine": machine | {"commit": commit(), "device": arguments.device}, "shape": shape}
        write_json(arguments.out, report | {"results": records, "errors": errors})
        print(f"wrote {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=512, help="hidden units of every model")
    parser.add_argument("--teachers", type=positive, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds")
    parser.add_argument("--shards", type=positive, default=4, help="CPU ranks of the errors' sharded vocabulary")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda: PyTorch finds no CUDA device; use cpu")
    return arguments


def measured(inputs: Inputs, kind: str, repeats: int) -> list[dict[str, Any]]:
    """A record per variant: medians over rounds in which they take turns, and counted bytes."""
    options, workspace = KINDS[kind], Workspace()
    calls: dict[str, Callable[[], object]] = {
        AT_ONCE: inputs.at_once(),
        IN_BLOCKS: inputs.in_blocks(),
        OURS: lambda: inputs.step(distillation_loss, workspace=workspace, **options),
        PLAIN: lambda: inputs.step(plain_distillation, **options),
    }
    ours, plain = (float(inputs.step(f, **options)) for f in (distillation_loss, plain_distillation))  # warms up
    tolerance = 1e-4 if inputs.hidden.dtype == torch.float32 else 4e-3
    if not abs(ours - plain) <= tolerance * max(1.0, plain):
        raise SystemExit(f"{kind}: {OURS} gives {ours:.6f} where {PLAIN} gives {plain:.6f}")
    gradients = sum(t.numel() * t.element_size() for t in (inputs.hidden, inputs.head))
    losses = {OURS: distillation_loss, PLAIN: plain_distillation}
    peaks = {name: counted(inputs, partial(inputs.step, f, **options)) - gradients for name, f in losses.items()}
    for name in (AT_ONCE, IN_BLOCKS, OURS):
        calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begun, cpu = clock(inputs), time.process_time()
            call()
            seconds[name].append(clock(inputs) - begun)
            cpu_seconds[name].append(time.process_time() - cpu)
    for times in (seconds, cpu_seconds):
        times[FLOOR] = [min(both) for both in zip(times[AT_ONCE], times[IN_BLOCKS], strict=True)]
    records = []
    for name in seconds:
        record: dict[str, Any] = {"kind": kind, "variant": name, "seconds": seconds[name]}
        record |= {"median_s": statistics.median(seconds[name]), "median_cpu_s": statistics.median(cpu_seconds[name])}
        for key, other in (("to_bare", FLOOR), ("to_plain", PLAIN)):
            record[key] = paired(seconds[name], seconds[other])
            record[f"cpu_{key}"] = paired(cpu_seconds[name], cpu_seconds[other])
        records.append(record | {"bytes_beside_gradients": peaks.get(name)})
    return records


def clock(inputs: Inputs) -> float:
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def counted(inputs: Inputs, call: Callable[[], object]) -> int:
    inputs.hidden.grad = inputs.head.grad = None
    with LiveBytes() as live:
        call()
    return live.peak


def all_errors(shards: int) -> list[dict[str, Any]]:
    """Relative errors against float64, for every type and temperature, whole and in shards."""
    whole = run_ranks(small_answers, 1, timeout_s=600.0)[0]
    parts = run_ranks(small_answers, shards, timeout_s=600.0)
    records = []
    for index, (key, exact) in enumerate((key, answer) for key, answer in exact_answers()):
        for name, found in (("whole", whole[index]), (f"{shards} shards", joined([part[index] for part in parts]))):
            error = {what: relative(found[what], exact[what]) for what in exact}
            records.append(
                dict(zip(("dtype", "temperature", "reverse"), key, strict=True)) | {"vocabulary": name} | error
            )
    return records


def small_cases() -> list[tuple[str, float, float]]:
    dtypes = ("float32", "bfloat16", "float16")
    return [(dtype, t, reverse) for dtype in dtypes for t in TEMPERATURES for reverse in (0.0, 1.0)]


def exact_answers() -> list[tuple[tuple[str, float, float], dict[str, Tensor]]]:
    answers = []
    for dtype, temperature, reverse in small_cases():
        inputs = Inputs.drawn(**SMALL, dtype=getattr(torch, dtype), device="cpu")
        wide = Inputs(
            inputs.hidden.detach().double().requires_grad_(),
            inputs.head.detach().double().requires_grad_(),
            [states.double() for states in inputs.teacher_hidden],
            [head.double() for head in inputs.teacher_heads],
            inputs.gate_logits.double(),
            inputs.target,
        )
        loss = wide.step(textbook, temperature=temperature, reverse=reverse)
        answers.append(((dtype, temperature, reverse), {"loss": loss, **gradients_of(wide)}))
    return answers


def textbook(
    hidden: Tensor,
    head: Tensor,
    states: list[Tensor],
    heads: list[Tensor],
    gate: Tensor,
    target: Tensor,
    **options: Any,
) -> Any:
    """KL by its definition, in the inputs' type, differentiated by autograd."""
    z = torch.stack(
        [w[:, None] * (h @ head.t()) for w, h, head in zip(gate.softmax(1).t(), states, heads, strict=True)]
    )
    t = options["temperature"]
    log_p, log_q = F.log_softmax(z.sum(0) / t, 1), F.log_softmax(hidden @ head.t() / t, 1)
    first, second = (log_q, log_p) if options["reverse"] else (log_p, log_q)
    rows = t**2 * (first.exp() * (first - second)).sum(1) * (target != IGNORE)
    return argparse.Namespace(loss=rows.sum() / (target != IGNORE).sum())


def gradients_of(inputs: Inputs) -> dict[str, Tensor]:
    assert inputs.hidden.grad is not None and inputs.head.grad is not None
    return {"hidden": inputs.hidden.grad, "head": inputs.head.grad}


def small_answers(rank: int) -> list[dict[str, Tensor]]:
    """This rank's shard of every small case."""
    shards, vocab = dist.get_world_size(), SMALL["vocab"]
    size = -(-vocab // shards)
    rows = slice(rank * size, min(vocab, (rank + 1) * size))
    answers = []
    for dtype, temperature, reverse in small_cases():
        inputs = Inputs.drawn(**SMALL, dtype=getattr(torch, dtype), device="cpu")
        inputs.head = inputs.head.detach()[rows].clone().requires_grad_()
        inputs.teacher_heads = [head[rows] for head in inputs.teacher_heads]
        shard = {"vocab_start": rows.start, "group": dist.group.WORLD if shards > 1 else None, "vocab_size": vocab}
        loss = inputs.step(distillation_loss, temperature=temperature, reverse=reverse, **shard)
        answers.append({"loss": loss, **gradients_of(inputs)})
    return answers


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        "loss": parts[0]["loss"],
        "hidden": torch.stack([part["hidden"].double() for part in parts]).sum(0),
        "head": torch.cat([part["head"] for part in parts]),
    }


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def lines_of(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in records:
        held = "" if r["bytes_beside_gradients"] is None else f"{r['bytes_beside_gradients'] / 2**20:.0f}"
        ratios = f"{r['to_bare']:8.2f}{r['to_plain']:9.2f}{r['cpu_to_bare']:12.2f}"
        lines.append(f"{r['kind']:20}{r['variant']:25}{r['median_s']:8.3f}{ratios}{held:>22}")
    return lines


def error_table(errors: list[dict[str, Any]]) -> list[str]:
    """The worst over temperatures and both divergences."""
    lines = [
        f"{'type':12}{'vocabulary':14}{'loss':>10}{'hidden':>10}{'head':>10}   worst of T 0.5 to 4, both divergences"
    ]
    for key in dict.fromkeys((e["dtype"], e["vocabulary"]) for e in errors):
        same = [e for e in errors if (e["dtype"], e["vocabulary"]) == key]
        worst = "".join(f"{max(e[what] for e in same):10.1e}" for what in ("loss", "hidden", "head"))
        lines.append(f"{key[0]:12}{key[1]:14}{worst}")
    return lines


if __name__ == "__main__":
    main()
