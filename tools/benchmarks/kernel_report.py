"""What the compilers made of every Triton and CUDA kernel, for a GPU that need not be there.

Kernels are compiled ahead of time; registers, local memory and tensor-core instructions are read out of the cubin with
the cuobjdump that ships with Triton. report_kernels.py prints this; a test holds it to "nothing spills".
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from main_loops import TENSOR_CORE, MainLoop, main_loops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultrafuser_mega.models import elementwise_triton
from ultrafuser_mega.ops import epilogue_triton, streaming_kernels, streaming_tiles

CAPABILITIES = (80, 90, 100)
TMA_LOAD = r"\bUTMALDG\b"
ROUNDED_PRODUCT = r"\bFFMA R\d+(?:, -?\|?R\d+(?:\.reuse)?\|?){2}, RZ"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # by Triton's names
COEFFICIENTS = dict.fromkeys(("row_max", "coefficient_a", "coefficient_b", "coefficient_c"), "*fp32")
USAGE_OF_FUNCTION = r"(\w+(?:<[^>]*>)?)\([^()]*\):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"


@dataclass(frozen=True)
class Resources:
    kernel: str
    capability: int
    registers: int  # per thread
    shared_bytes: int  # per program
    local_bytes: int  # per thread: spilled registers
    tensor_core: dict[str, int]  # instruction: how often it stands in the code
    tma_loads: int  # as often
    rounded_products: int = 0  # as often: products of fp32 that stay products, whatever is added to them next
    loops: tuple[MainLoop, ...] = ()  # those that hold tensor-core instructions
    seconds: float = 0.0  # of CPU that compiling took


@dataclass(frozen=True)
class _Source:
    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]  # of Triton's compiler


def report(capability: int, dtype: str = "bf16", specialists: int = 3) -> list[Resources]:
    """Every kernel compiled for sm_<capability> and so many specialists' heads of ``dtype``."""
    sources = (*_chunked_sources(dtype, specialists), *_streaming_sources(capability, dtype, specialists))
    return [_compile(source, capability) for source in (*sources, *_layer_sources(dtype))]


def streaming_report(capability: int, dtype: str, specialists: int, **constants: Any) -> list[Resources]:
    """The streaming backend's kernels alone. ``constants`` take the place of their own where they have such."""
    sources = _streaming_sources(capability, dtype, specialists)
    changed = (
        replace(s, constants=s.constants | {k: v for k, v in constants.items() if k in s.constants}) for s in sources
    )
    return [_compile(source, capability) for source in changed]


def cuda_report(nvcc: str, source: Path, capabilities: Sequence[int] = CAPABILITIES) -> list[Resources]:
    """Every kernel of the CUDA file ``source``, compiled by ``nvcc`` for each sm_<capability>."""
    targets = [f"-gencode=arch=compute_{capability},code=sm_{capability}" for capability in capabilities]
    with tempfile.NamedTemporaryFile(suffix=".fatbin") as file:
        command = [nvcc, "-fatbin", "-O3", "-std=c++17", *targets, str(source), "-o", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{nvcc} refuses {source}: {done.stderr.strip()}")
        usage = _cuobjdump(file.name, "--dump-resource-usage")
    readable = subprocess.run(["c++filt"], input=usage, capture_output=True, text=True, check=True).stdout
    reports = []
    for part in readable.split("arch = sm_")[1:]:
        capability = int(re.match(r"\d+", part)[0])  # type: ignore[index]
        for kernel, registers, stack, shared, local in re.findall(USAGE_OF_FUNCTION, part):
            reports.append(Resources(kernel, capability, int(registers), int(shared), int(stack) + int(local), {}, 0))
    return reports


def _chunked_sources(dtype: str, specialists: int) -> Iterator[_Source]:
    rows = {"columns": "i32", "row_stride": "i64"}
    steps = epilogue_triton.STEPS
    yield _Source(
        "chunked: row_statistics",
        epilogue_triton.row_statistics_kernel,
        {"logits": "*fp32", "target": "*i64", "statistics": "*fp32"} | rows,
        {"BLOCK": steps["row statistics"][0]},
        epilogue_triton.options("row statistics"),
    )
    yield _Source(
        "chunked: dlogits",
        epilogue_triton.dlogits_kernel,
        {"logits": "*fp32", "gradient": f"*{dtype}", "target": "*i64"}
        | COEFFICIENTS
        | rows
        | {"gradient_stride": "i64"},
        {"BLOCK": steps["dlogits"][0]},
        epilogue_triton.options("dlogits"),
    )
    yield _Source(
        "gate_only: mixture_statistics",
        epilogue_triton.mixture_statistics_kernel,
        {"logits": "*fp32", "gate_weights": "*fp32", "target": "*i64", "statistics": "*fp32"}
        | rows
        | {"plane_stride": "i64"},
        {
            "specialists": specialists,
            "PADDED": triton.next_power_of_2(specialists),
            "BLOCK": steps["mixture statistics"][0],
        },
        epilogue_triton.options("mixture statistics"),
    )
    yield _Source(
        "chunked: mixture_dlogits",
        epilogue_triton.mixture_dlogits_kernel,
        {"logits": "*fp32", "gradient": f"*{dtype}", "gate_weights": "*fp32", "target": "*i64"}
        | COEFFICIENTS
        | rows
        | {"plane_stride": "i64", "gradient_stride": "i64", "gradient_plane_stride": "i64"},
        {"specialists": specialists, "BLOCK": steps["mixture dlogits"][0]},
        epilogue_triton.options("mixture dlogits"),
    )


def _streaming_sources(capability: int, dtype: str, specialists: int) -> Iterator[_Source]:
    operands = {
        "hidden": (f"*{dtype}",) * specialists,
        "heads": (f"*{dtype}",) * specialists,
        "hidden_strides": ("i32",) * specialists,
        "head_strides": ("i32",) * specialists,
        "widths": ("i32",) * specialists,
        "gate_weights": "*fp32",
        "target": "*i64",
    }
    tiny = {"has_tiny": "*i1"}
    statistics = {"statistics": "*fp32", "N": "i32", "R": "i32", "split_columns": "i32"}
    gradient = {"gradient": f"*{dtype}", "N": "i32", "begin": "i32", "end": "i32", "gradient_stride": "i32"}
    for name, kernel, arguments in (
        ("statistics", streaming_kernels.statistics_kernel, tiny | statistics),
        ("gate statistics", streaming_kernels.gate_statistics_kernel, statistics),
        ("dlogits", streaming_kernels.dlogits_kernel, tiny | COEFFICIENTS | gradient),
    ):
        tile = streaming_tiles.tile(name, capability, DTYPES[dtype], specialists)
        yield _Source(
            f"streaming: {name}",
            kernel,
            operands | arguments,
            streaming_tiles.constants(tile, name, (tile.block_k,) * specialists, DTYPES[dtype]),
            streaming_tiles.options(tile),
        )


def _layer_sources(dtype: str) -> Iterator[_Source]:
    """A decoder layer's own operations, norms in the widths of heads, of hidden states, and the widest that their
    registers hold."""
    x, rows = f"*{dtype}", {"rows": "i32", "width": "i32"}
    for width in (128, 4096, 5120, 16384 if DTYPES[dtype].itemsize == 2 else 8192):
        block, block_rows, warps = elementwise_triton.norm_tile(width, *elementwise_triton.FORWARD)
        yield _Source(
            f"layer: norm forward, {width}",
            elementwise_triton.rms_norm_forward_kernel,
            {"x": x, "weight": x, "y": x, "rstd": "*fp32"} | rows | {"x_stride": "i32", "eps": "fp32"},
            {"ROWS": block_rows, "BLOCK": block},
            {"num_warps": warps} | elementwise_triton.FUSION,
        )
        block, block_rows, warps = elementwise_triton.norm_tile(width, *elementwise_triton.BACKWARD)
        yield _Source(
            f"layer: norm backward, {width}",
            elementwise_triton.rms_norm_backward_kernel,
            {"dy": x, "x": x, "weight": x, "rstd": "*fp32", "dx": x, "partial_dw": "*fp32"}
            | rows
            | {"dy_stride": "i32", "x_stride": "i32"},
            {"ROWS": block_rows, "BLOCK": block},
            {"num_warps": warps} | elementwise_triton.FUSION,
        )
    block = elementwise_triton.SWIGLU_BLOCK
    yield _Source(
        "layer: swiglu forward",
        elementwise_triton.swiglu_forward_kernel,
        {"x": x, "y": x, "width": "i32", "x_stride": "i32"},
        {"BLOCK": block},
        {"num_warps": 4} | elementwise_triton.FUSION,
    )
    yield _Source(
        "layer: swiglu backward",
        elementwise_triton.swiglu_backward_kernel,
        {"dy": x, "x": x, "dx": x, "width": "i32", "dy_stride": "i32", "x_stride": "i32"},
        {"BLOCK": block},
        {"num_warps": 4} | elementwise_triton.FUSION,
    )
    sizes = dict.fromkeys(("groups", "each", "half"), "i32")
    strides = [f"{which}_{of}_stride" for which in "qkv" for of in ("token", "head")]
    for heads, width in ((15, 128), (48, 128), (120, 80)):  # of 13B at tp 8, Llama 3 8B, and with a mask
        block, half = elementwise_triton.heads_tile(heads, width // 2)
        tile = {"HEADS": block, "HALF": half}
        yield _Source(
            f"layer: heads forward, {heads} of {width}",
            elementwise_triton.rotated_heads_forward_kernel,
            dict.fromkeys(("mixed", "cos", "sin", "q", "k", "v"), x) | sizes | {"mixed_stride": "i32"},
            tile,
            {"num_warps": 4} | elementwise_triton.FUSION,
        )
        yield _Source(
            f"layer: heads backward, {heads} of {width}",
            elementwise_triton.rotated_heads_backward_kernel,
            dict.fromkeys(("dq", "dk", "dv", "cos", "sin", "mixed"), x) | sizes | dict.fromkeys(strides, "i32"),
            tile,
            {"num_warps": 4} | elementwise_triton.FUSION,
        )


def _compile(source: _Source, capability: int) -> Resources:
    signature = source.signature | dict.fromkeys(source.constants, "constexpr")
    ast = ASTSource(source.kernel, signature, constexprs=source.constants, attrs=_aligned(signature))
    begun = _cpu_seconds()
    compiled = triton.compile(ast, GPUTarget("cuda", capability, 32), source.options)
    seconds = _cpu_seconds() - begun
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(file.name, option) for option in ("--dump-resource-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers for {source.name} on sm_{capability}: {usage[:200]}")
    counts = dict(Counter(re.findall(TENSOR_CORE, code)))
    registers, stack, local = (int(number) for number in found.groups())
    return Resources(
        source.name,
        capability,
        registers,
        compiled.metadata.shared,
        stack + local,
        counts,
        len(re.findall(TMA_LOAD, code)),
        len(re.findall(ROUNDED_PRODUCT, code)),
        tuple(main_loops(code)),
        seconds,
    )


def _cpu_seconds() -> float:
    """Of this process and of the assemblers that it has called."""
    return sum(os.times()[:4])


def _aligned(signature: dict[str, Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    """What the launcher would find out by itself: pointers, strides and widths are multiples of 16."""
    hint: list[list[Any]] = [["tt.divisibility", 16]]
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, kind) in enumerate(signature.items()):
        if isinstance(kind, tuple):
            attributes |= {(index, j): hint for j in range(len(kind))}
        elif kind.startswith("*") or name.endswith(("stride", "width")):
            attributes[(index,)] = hint
    return attributes


def _cuobjdump(file: str, option: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout
