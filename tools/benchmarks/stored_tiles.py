"""The fused logits that a tile of the streaming backend's kernels works on, written to memory to be looked at."""

# What a kernel takes is typed by Triton's compiler.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultrafuser_mega.ops import streaming_tiles
from ultrafuser_mega.ops.streaming_kernels import mixed_tile, operands


@triton.jit(do_not_specialize=["N", "R"])
def stored_tile_kernel(
    hidden, heads, hidden_strides, head_strides, widths, gate_weights, has_tiny,
    z,  # (N, R) fp32 out
    N, R,
    n: tl.constexpr, HORNER: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0) // tl.cdiv(R, BLOCK_N)
    start = tl.program_id(0) % tl.cdiv(R, BLOCK_N) * BLOCK_N
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(row, N - 1).to(tl.int64)
    column = start + tl.arange(0, BLOCK_N)
    columns = tl.minimum(column, R - 1).to(tl.int64)
    xs = operands(hidden, hidden_strides, widths, N, n, TMA, BLOCK_M, BLOCK_K)
    ws = operands(heads, head_strides, widths, R, n, TMA, BLOCK_N, BLOCK_K)
    tile = mixed_tile(
        xs, ws, row_block * BLOCK_M, start, rows, columns, hidden_strides, head_strides, widths, gate_weights,
        has_tiny + row_block * n, n, HORNER, TMA, SPECIALIZED, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(z + rows[:, None] * R + column[None, :], tile, mask=(row < N)[:, None] & (column < R)[None, :])


def stored_logits(
    hidden: Sequence[Tensor],  # n x (N, d_j)
    heads: Sequence[Tensor],  # n x (V, d_j)
    gate_logits: Tensor,  # (N, n)
    tile: streaming_tiles.Tile,
    *,
    detour: bool = False,
    horner: bool | None = None,
) -> Tensor:
    """z (N, V) fp32 through tiles of this kind, on a GPU or through Triton's interpreter.

    Args:
        detour: take in every block the loop that is for blocks with a weight of next to 0.
        horner: how the gate weighs the operands; None as their type has it, False in registers, each for itself.
    """
    rows, columns = hidden[0].shape[0], heads[0].shape[0]
    gate_weights = torch.softmax(gate_logits, 1)
    z = gate_weights.new_full((rows, columns), torch.nan)
    has_tiny = streaming_tiles.has_tiny(gate_weights, tile.block_m)

    def programs(_tile: streaming_tiles.Tile) -> int:
        return int(triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n))

    def rest(_tile: streaming_tiles.Tile) -> tuple[Any, ...]:
        return gate_weights, has_tiny | detour, z, rows, columns

    with mock.patch.object(streaming_tiles, "tile", lambda *_chosen: tile), weighing(horner):
        streaming_tiles.launch("dlogits", stored_tile_kernel, programs, hidden, heads, rest)
    return z


@contextlib.contextmanager
def weighing(horner: bool | None) -> Iterator[None]:
    """The streaming kernels weigh operands so while this lasts; None as they do."""
    original = streaming_tiles.constants

    def constants(*arguments: Any) -> dict[str, Any]:
        found = original(*arguments)
        return found | {"HORNER": horner} if horner is not None and "HORNER" in found else found

    with mock.patch.object(streaming_tiles, "constants", constants):
        yield
