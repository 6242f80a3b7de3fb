"""Statistics of every row without a gradient in sight: the forward pass of evaluation and of the gate-only backend.

Nothing has to be kept, so the logits are cut along the vocabulary too: blocks of rows x columns that fit a small
buffer whatever the vocabulary, each head row read once per block of rows, statistics combined as the blocks go by.
Under a group one collective at the end of all blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.ops import gemm
from ultrafuser_mega.ops.epilogue import Epilogue
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import COLUMNS, PendingStatistics, combine

BLOCK_COLUMNS = {"cpu": 2048, "cuda": 8192}


def buffer_budget(device: torch.device) -> int:
    """Bytes of logits held at once, unless the caller says otherwise."""
    return (768 << 20) if device.type == "cuda" else (64 << 20)


def forward_statistics(
    problem: Problem, gate_weights: Tensor, epilogue: Epilogue, buffer_bytes: int, *, per_specialist: bool
) -> Tensor:
    """Statistics over the whole vocabulary (statistics.py): (N, 4), or (N, 4 + 3 n) if ``per_specialist``.

    Args:
        gate_weights: (N, n), w = softmax(a); finite on ignored rows.
        buffer_bytes: bound on the logit buffer.
    """
    n, real = len(problem.hidden), problem.real_rows
    planes = n if per_specialist else 1
    columns = min(max(real, 1), BLOCK_COLUMNS.get(gate_weights.device.type, BLOCK_COLUMNS["cuda"]))
    chunk_rows = max(1, min(problem.rows, buffer_bytes // (planes * columns * gate_weights.element_size())))
    buffer = gate_weights.new_empty((planes, chunk_rows, columns))
    statistics = gate_weights.new_empty((problem.rows, COLUMNS + (3 * n if per_specialist else 0)))
    target, ignored = problem.local_target(), ~problem.kept()[:, None]
    for start in range(0, problem.rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, problem.rows))
        weights = gate_weights[rows]
        inputs = [states[rows].masked_fill(ignored[rows], 0.0) for states in problem.hidden]  # NaN must not matter
        if not per_specialist:
            inputs = [(x * weights[:, j, None]).to(epilogue.operand_dtype) for j, x in enumerate(inputs)]
        for first in range(0, max(real, 1), columns):
            last = min(first + columns, real)
            logits = buffer[:, : rows.stop - rows.start, : last - first]  # (planes, C, B)
            for j, (x, head) in enumerate(zip(inputs, problem.heads, strict=True)):
                plane = logits[j if per_specialist else 0]
                gemm.accumulate(plane, x, head[first:last].t(), add=j > 0 and not per_specialist)
            here = (target[rows] >= first) & (target[rows] < last)
            column = (target[rows] - first).masked_fill(~here, -1)
            if per_specialist:
                block = epilogue.mixture_statistics(logits, weights, column)
            else:
                block, _ = epilogue.statistics(logits[0], column, keep=False)
            statistics[rows] = block if first == 0 else combine_two(statistics[rows], first, block, last - first)
    return PendingStatistics(statistics, real, problem.settings).wait()


def combine_two(first: Tensor, first_columns: int, second: Tensor, second_columns: int) -> Tensor:
    """Statistics of the union of two sets of columns."""
    stacked = first.new_empty((2, *first.shape))
    stacked[0], stacked[1] = first, second
    columns = first.new_full((2, 1), float(second_columns))
    columns[0] = first_columns
    return combine(stacked, columns)
