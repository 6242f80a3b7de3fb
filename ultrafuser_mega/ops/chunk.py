"""A chunk of rows on its way through the chunked backend: the first half of it, and the memory of its logits.

The vocabulary is cut into ``blocks``, each with a piece of the buffer for itself: (C, B) logits, rows ``pitch`` apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultrafuser_mega.ops import gate_scale, gemm
from ultrafuser_mega.ops.epilogue import Epilogue
from ultrafuser_mega.ops.forward import pitch, union
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import PendingStatistics


@dataclass
class Chunk:
    """A chunk between its two halves: its logits are computed, its statistics are on their way to all ranks."""

    rows: slice
    buffer: Tensor  # whose memory the logits have
    logits: list[Tensor]  # blocks (C, B); the epilogue's from here on
    gate_weights: Tensor  # (C, n)
    inputs: list[Tensor]  # n x (C, d_j): x_j = w_j h_j
    scratch: list[Any]  # the epilogue's, of every block
    pending: PendingStatistics


def buffer_numbers(rows: int, blocks: Sequence[slice], device: torch.device) -> int:
    """How many numbers a buffer of so many rows holds."""
    return rows * sum(pitch(block.stop - block.start, device) for block in blocks)


def begin_chunk(
    problem: Problem,
    epilogue: Epilogue,
    blocks: Sequence[slice],
    rows: slice,
    buffer: Tensor,
    kept: Tensor,  # (N,)
    targets: Tensor,  # (blocks, N): each row's target as a column of the block, -1 where it lies in another
) -> Chunk:
    """The first half of a chunk's way, its logits in ``buffer``."""
    gate_weights, inputs = gate_scale.scale_inputs(
        problem.gate_logits[rows],
        kept[rows],
        [states[rows] for states in problem.hidden],
        epilogue.operand_dtype,
    )
    logits, found, scratch = list(cut_out(buffer, rows.stop - rows.start, blocks)), [], []
    for block, z, target in zip(blocks, logits, targets, strict=True):
        for j, (x, head) in enumerate(zip(inputs, problem.heads, strict=True)):
            gemm.accumulate(z, x, head[block].t(), add=j > 0)
        statistics, of_block = epilogue.statistics(z, target[rows], keep=True)
        found.append(statistics)
        scratch.append(of_block)
    local = union(found, blocks[0].stop, problem.real_rows)
    pending = PendingStatistics(local, problem.real_rows, problem.settings)
    return Chunk(rows, buffer, logits, gate_weights, inputs, scratch, pending)


def cut_out(buffer: Tensor, rows: int, blocks: Sequence[slice]) -> Iterator[Tensor]:
    """The logits (C, B) of every block, in a buffer of ``buffer_numbers`` of at least so many rows."""
    start = 0
    for block in blocks:
        columns = block.stop - block.start
        between = pitch(columns, buffer.device)
        yield buffer[start : start + rows * between].view(rows, between)[:, :columns]
        start += rows * between
