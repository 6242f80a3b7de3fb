"""How close a decoder layer's own kernels come to copying memory.

    python tools/benchmarks/bench_elementwise.py [--out FILE.json]

Norm, SwiGLU and the heads of attention, forward and backward, in bf16: the Triton kernels, the formulas that other
devices run, the same compiled by torch.compile, PyTorch's own norm, and a copy of the same number of bytes take turns
in one run; medians of 50 rounds. The bytes are those that an operation cannot do without: every input read and every
result written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_gate_scale import copy_of, interleaved
from scripting import Parser, result_file, write_json
from torch import Tensor

from ultrafuser_mega.models import elementwise

TOKENS, EPS = 8192, 1e-5
SHAPES = {  # hidden size, of the MLP, heads, groups, of a head
    "llama2-13b": (5120, 13824, 40, 40, 128),
    "llama3-8b": (4096, 14336, 32, 8, 128),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--skip-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=result_file, help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_elementwise: no CUDA device")
    records = []
    print(f"{'shape':12} {'operation':22} {'variant':14} {'us':>9} {'GB/s':>8} {'of copy':>8}")
    for name in SHAPES:
        for record in measure(name, compiled=not arguments.skip_compile):
            records.append(record)
            print(
                f"{name:12} {record['operation']:22} {record['variant']:14} {record['median_us']:9.1f}"
                f" {record['gb_per_s']:8.0f} {record['of_copy']:8.1%}"
            )
        if arguments.out:
            report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": records}
            write_json(arguments.out, report)


def measure(name: str, compiled: bool) -> Iterator[dict[str, Any]]:
    for operation, arguments in operations(*SHAPES[name]).items():
        kernel, formula = getattr(elementwise, operation), elementwise.FORMULAS[operation]
        results = kernel(*arguments)
        tensors = [*arguments, *(results if isinstance(results, tuple) else (results,))]
        size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        calls: dict[str, Callable[[], object]] = {"copy": copy_of(size // 2), "kernel": partial(kernel, *arguments)}
        calls["formula"] = partial(formula, *arguments)
        if compiled:
            calls["torch.compile"] = partial(torch.compile(formula), *arguments)
        calls |= torchs_norm(operation, arguments)
        medians = interleaved(calls)
        for variant, seconds in medians.items():
            yield {
                "shape": name,
                "operation": operation,
                "variant": variant,
                "median_us": seconds * 1e6,
                "gb_per_s": size / seconds / 1e9,
                "of_copy": medians["copy"] / seconds,
            }


def operations(width: int, mlp: int, heads: int, groups: int, head: int) -> dict[str, tuple[Any, ...]]:
    """The arguments of every operator."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, dy, weight = normal(TOKENS, width), normal(TOKENS, width), normal(width)
    _, rstd = elementwise.rms_norm_forward(x, weight, EPS)
    both, upstream = normal(TOKENS, 2 * mlp), normal(TOKENS, mlp)
    mixed = normal(TOKENS, (heads + 2 * groups) * head)
    dq, dk, dv = (normal(TOKENS, n, head) for n in (heads, groups, groups))
    cos, sin = normal(TOKENS, 1, 1, head // 2), normal(TOKENS, 1, 1, head // 2)
    return {
        "rms_norm_forward": (x, weight, EPS),
        "rms_norm_backward": (dy, x, weight, rstd),
        "swiglu_forward": (both,),
        "swiglu_backward": (upstream, both),
        "rotated_heads_forward": (mixed, cos, sin, groups),
        "rotated_heads_backward": (dq, dk, dv, cos, sin),
    }


def torchs_norm(operation: str, arguments: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    """F.rms_norm where it does the same."""
    if operation == "rms_norm_forward":
        x, weight, eps = arguments
        return {"F.rms_norm": lambda: F.rms_norm(x, weight.shape, weight, eps)}
    if operation == "rms_norm_backward":
        dy, x, weight, _ = arguments
        inputs = [t.detach().requires_grad_() for t in (x, weight)]
        y = F.rms_norm(inputs[0], weight.shape, inputs[1], EPS)
        return {"F.rms_norm": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)}
    return {}


if __name__ == "__main__":
    main()
