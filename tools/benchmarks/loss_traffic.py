"""Bytes that the loss moves outside its matrix products, counted operation by operation; needs no GPU.

    python tools/benchmarks/loss_traffic.py [--tokens 8192 --width 5120] [--out FILE.json]

The loss runs, forward and backward, on tensors without data, as rank 0 of a group that does not exist: with the
kernels, buffers and types that it has on a GPU where the CUDA extension is built. An operation counts what it reads and
what it writes, as if nothing stayed in a cache; products and what they write are left to the bare products' time. With
the whole vocabulary and a shard of an eighth, training and the gate alone; training an eighth also in the ways that it
went before: with two buffers always, and with one for the mixture of all specialists. "ms" are the bytes at
--bandwidth, "ratio" is that on top of the time of the products (three passes, or one) at --rate: a bound from below,
without launches, collectives, and what fp32 results cost them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from benchmark import TASKS
from scripting import Parser, positive, result_file, write_json
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ultrafuser_mega.ops import chunked, forward, gate_only, gate_scale_cuda, planes
from ultrafuser_mega.ops.epilogue_triton import TritonEpilogue
from ultrafuser_mega.ops.problem import checked_problem

SPECIALISTS = 3
OVERWRITE = ("copy_", "zero_", "fill_")
SHARDS = {"whole": 1, "an eighth": 8}
WHAT = [("train", "whole", "as it is"), ("train", "an eighth", "two always"), ("train", "an eighth", "one mixture")]
WHAT += [("train", "an eighth", "as it is")]
WHAT += [("gate_only", "whole", "as it is"), ("gate_only", "an eighth", "as it is")]
MOVES_NOTHING = ("empty", "detach", "view", "alias", "set_", "device")


class Traffic(TorchDispatchMode):
    """Bytes read and written by operation, and how often each ran."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace == "c10d" or any(part in name for part in MOVES_NOTHING):
            return result
        schema = func._schema
        given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
        read = written = 0
        for argument in schema.arguments:
            size = _bytes(given.get(argument.name))
            is_out = argument.alias_info is not None and argument.alias_info.is_write
            if name.endswith("dlogits") and argument.name == "logits":  # marked since dz is written into their memory
                is_out = False
            fresh = argument.kwarg_only or func.namespace == "ultrafuser" or name in OVERWRITE
            written += size if is_out else 0
            read += 0 if is_out and fresh else size
        if not written:
            written = _bytes(result)
        self.bytes[name] += read + written
        self.calls[name] += 1
        return result


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tokens", type=positive, default=8192)
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--width", type=positive, default=5120, help="of each of three specialists")
    parser.add_argument("--rate", type=positive, default=790, help="TFLOP/s of bf16 products; default %(default)s")
    parser.add_argument("--bandwidth", type=positive, default=3000, help="GB/s of memory; default %(default)s")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    records = []
    print(f"{'task':10} {'vocabulary':10} {'buffers':11} {'GB':>6} {'ms':>6} {'ratio':>6}  most of it")
    for task, vocabulary, buffers in WHAT:
        record = counted(arguments, task, SHARDS[vocabulary], buffers)
        records.append({"task": task, "vocabulary": vocabulary, "buffers": buffers} | record)
        most = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in list(record["bytes"].items())[:5])
        print(f"{task:10} {vocabulary:10} {buffers:11} {record['total'] / 1e9:6.2f} "
              f"{record['ms']:6.2f} {record['ratio']:6.3f}  {most}")  # fmt: skip
    if arguments.out:
        sizes = {"tokens": arguments.tokens, "vocab": arguments.vocab, "width": arguments.width}
        write_json(arguments.out, sizes | {"records": records})


def counted(arguments: argparse.Namespace, task: str, shards: int, buffers: str) -> dict[str, Any]:
    tokens, widths = arguments.tokens, (arguments.width,) * SPECIALISTS
    held = -(-arguments.vocab // shards)
    with group_of(shards) as group, FakeTensorMode(), on_a_gpu(buffers):
        half: dict[str, Any] = {"dtype": torch.bfloat16, "requires_grad": task == "train"}
        hidden = [torch.empty(tokens, d, **half) for d in widths]
        heads = [torch.empty(held, d, **half) for d in widths]
        gate = torch.empty(tokens, SPECIALISTS, requires_grad=True)
        target = torch.empty(tokens, dtype=torch.int64)
        problem = checked_problem(
            hidden, heads, gate, target, group=group, vocab_start=0, vocab_size=arguments.vocab, ignore_index=-100,
            reduction="mean", label_smoothing=0.0, z_loss=0.0,
        )  # fmt: skip
        epilogue, budget = TritonEpilogue(torch.bfloat16), forward.BUFFER_BYTES["cuda"]
        backend = chunked if task == "train" else gate_only
        upstream = torch.empty(())
        with Traffic() as traffic:
            backend.mixture_loss(problem, buffer_bytes=budget, epilogue=epilogue)[0].backward(upstream)
    total = sum(traffic.bytes.values())
    products_ms = TASKS[task][1] * 2 * tokens * held * sum(widths) / arguments.rate / 1e9
    ms = total / arguments.bandwidth / 1e6
    order = [name for name, _ in traffic.bytes.most_common()]
    return {
        "total": total,
        "products_ms": products_ms,
        "ms": ms,
        "ratio": (products_ms + ms) / products_ms,
        "bytes": {name: traffic.bytes[name] for name in order},
        "calls": {name: traffic.calls[name] for name in order},
    }


@contextmanager
def group_of(ranks: int) -> Iterator[Any]:
    if ranks == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def on_a_gpu(buffers: str) -> Iterator[None]:
    """The loss takes a GPU's kernels, and its products leave no trace."""

    def two_buffers(rows: int, *rest: int) -> tuple[int, int, int]:
        buffers, most, row_bytes = forward.cut(1 << 40, *rest)  # of so many rows that one buffer cannot take them
        return buffers, forward.even_rows(rows, most), row_bytes

    with (
        mock.patch("ultrafuser_mega.ops.gemm.accumulate", lambda *_operands, **_options: None),
        mock.patch("ultrafuser_mega.ops.gate_scale._chosen", lambda *_of: gate_scale_cuda),
        mock.patch.object(chunked, "cut", two_buffers if buffers == "two always" else forward.cut),
        mock.patch.object(planes, "serve", planes.serve if buffers == "as it is" else lambda *_of: False),
    ):
        yield


if __name__ == "__main__":
    main()
