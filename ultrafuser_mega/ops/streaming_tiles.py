"""Which tile each Triton kernel of the streaming backend takes on which GPU, and how a kernel is launched with it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ultrafuser_mega.ops.streaming_kernels import TINY_WEIGHT


class Tile(NamedTuple):
    block_m: int  # rows
    block_n: int  # columns of the vocabulary
    block_k: int
    warps: int
    stages: int
    tma: bool = False  # operands come through tensor descriptors
    specialized: bool = False  # warps of their own fetch them
    halves: bool = False  # "statistics" alone: a tile is looked at in two halves


# By kernel and compute capability: the largest found that spill no registers in a loop with two or three specialists
# and Triton 3.6 and 3.9 (tests/unit/tools/test_kernel_report.py holds it; more specialists, or pointers to widths that
# BLOCK_K does not divide, may spill a few words). On 9.0 only descriptors leave room for 128 x 256, which asks the L2
# cache for three quarters of what 128 x 128 does per product. None is timed yet; tools/benchmarks/tune_kernels.py times
# others. In "gate statistics" the tiles of all specialists are alive at once: its entries are for up to three.
TILES: dict[str, dict[int, Tile]] = {
    "statistics": {
        80: Tile(128, 128, 32, 8, 3, halves=True),
        90: Tile(128, 256, 64, 8, 3, tma=True, halves=True),
        100: Tile(128, 64, 64, 8, 3, tma=True),
    },
    "gate statistics": {
        80: Tile(64, 64, 32, 8, 4),
        90: Tile(128, 64, 64, 8, 3, tma=True),
        100: Tile(64, 64, 64, 8, 4, tma=True),
    },
    "dlogits": {
        80: Tile(128, 128, 32, 8, 3),
        90: Tile(128, 256, 64, 8, 4, tma=True),
        100: Tile(128, 128, 64, 8, 3, tma=True),
    },
}
# fp32 runs beside the tensor cores: for comparisons, not for speed
FP32_TILES = {
    "statistics": Tile(64, 64, 16, 8, 3),
    "gate statistics": Tile(64, 32, 32, 8, 3),
    "dlogits": Tile(64, 64, 32, 8, 3),
}


def generation(capability: int) -> int:
    """The entry of TILES for a compute capability: 80, 90 or 100. Consumer GPUs have no more shared memory than 8.x."""
    known = TILES["statistics"]
    return max(entry for entry in known if entry <= max(capability, 80)) if capability < 110 else 80


def tile(kernel: str, capability: int, dtype: torch.dtype, specialists: int, aligned: bool = True) -> Tile:
    """The tile for operands of ``dtype``; ``aligned`` says whether tensor descriptors can describe them."""
    if dtype == torch.float32:
        found = FP32_TILES[kernel]
    else:
        found = TILES[kernel][generation(capability)]
        if found.tma and not aligned:
            found = TILES[kernel][80]
    if kernel == "gate statistics" and specialists > 3:
        found = found._replace(block_n=32)
    return found


def capability(tensor: Tensor) -> int:
    """Compute capability of the GPU a tensor lies on: 80, 90, 100, ..."""
    if not tensor.is_cuda:
        return 80  # Triton's interpreter
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def constants(chosen: Tile, kernel: str, widths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of the kernel for specialists of these widths and operands of ``dtype``."""
    halves = {"HALVES": chosen.halves} if kernel == "statistics" else {}
    horner = {} if kernel == "gate statistics" else {"HORNER": dtype.itemsize == 2}
    return (halves | horner) | {
        "n": len(widths),
        "EVEN_K": chosen.tma or all(width % chosen.block_k == 0 for width in widths),
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "TMA": chosen.tma,
        "SPECIALIZED": chosen.specialized,
    }


def options(chosen: Tile) -> dict[str, Any]:
    """How Triton is to compile a kernel. Whether multiplications and additions are fused by default is another thing in
    every version of it; said here, they all give the same bits."""
    return {"num_warps": chosen.warps, "num_stages": chosen.stages, "enable_fp_fusion": True}


def launch(
    name: str,
    kernel: Any,
    programs: Callable[[Tile], int],
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    rest: Callable[[Tile], tuple[Any, ...]],
) -> None:
    """Run ``kernel``, called ``name`` in the tables, in as many programs as its tile makes of the problem.

    Args:
        hidden, heads: n x (N, d_j) and n x (R, d_j).
        rest: of the tile the kernel's arguments after the operands, their strides and widths.
    """
    hidden, heads = [_operand(t) for t in hidden], [_operand(t) for t in heads]
    aligned = all(map(_aligned_rows, (*hidden, *heads)))
    chosen = tile(name, capability(hidden[0]), hidden[0].dtype, len(hidden), aligned)
    strides = [tuple(t.stride(0) for t in tensors) for tensors in (hidden, heads)]
    widths = tuple(states.shape[1] for states in hidden)

    def run() -> None:
        # where Triton keeps the descriptors; it asks for them in this context and no other
        triton.set_allocator(
            lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=hidden[0].device)
        )
        with torch.cuda.device_of(hidden[0]):  # Triton launches on the current device
            kernel[(programs(chosen),)](
                tuple(hidden),
                tuple(heads),
                *strides,
                widths,
                *rest(chosen),
                **constants(chosen, name, widths, hidden[0].dtype),
                **options(chosen),
            )

    contextvars.copy_context().run(run)


def has_tiny(gate_weights: Tensor, block_rows: int) -> Tensor:  # gate_weights (N, n)
    """(row blocks, n) bool: whether a row of the block gives the specialist less than TINY_WEIGHT."""
    rows, n = gate_weights.shape
    tiny = gate_weights.new_zeros((triton.cdiv(rows, block_rows) * block_rows, n), dtype=torch.bool)
    torch.lt(gate_weights, TINY_WEIGHT.value, out=tiny[:rows])
    return tiny.view(-1, block_rows, n).any(1)


def _operand(matrix: Tensor) -> Tensor:
    """With contiguous rows, and where these are as far apart as descriptors need it, the first one in place for them,
    too: which tile a row meets must not depend on where in memory its batch begins."""
    if matrix.stride(1) != 1:
        return matrix.contiguous()
    return matrix.clone() if _aligned_rows(matrix) and matrix.data_ptr() % 16 else matrix


def _aligned_rows(matrix: Tensor) -> bool:
    return matrix.stride(0) * matrix.element_size() % 16 == 0
