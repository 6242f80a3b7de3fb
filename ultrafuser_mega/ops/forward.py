"""Statistics of every row without a gradient in sight: the forward pass of evaluation and of the gate-only backend.

Nothing has to be kept, so the logits are cut along the vocabulary too: blocks of rows x columns that fit a small
buffer whatever the vocabulary, each head row read once per chunk of rows. A chunk's blocks are combined all at once;
under a group one collective follows at the end of all chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultrafuser_mega.ops import gate_scale, gemm
from ultrafuser_mega.ops.epilogue import Epilogue
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import COLUMNS, PendingStatistics, combine

BLOCK_COLUMNS = {"cpu": 1024, "cuda": 8192}
BUFFER_BYTES = {"cpu": 72 << 20, "cuda": 896 << 20}
HOST_BLOCK_BYTES = 30 << 20  # what glibc holds between calls ends at 32 MiB: more is zeroed page by page every time
ROW_MULTIPLE = 128  # rows of a chunk: whole GEMM tiles
PITCH_MULTIPLE = 64  # columns: every row of a buffer starts on a cache line, also when it holds 16-bit numbers
HOST_PITCH_EXTRA = 16  # columns: rows a power of two of bytes apart would share a few sets of a CPU's caches


def buffer_budget(device: torch.device) -> int:
    """Bytes of logits, and of what else grows with their rows, held at once, unless the caller says otherwise."""
    return BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"])


def even_rows(rows: int, limit: int) -> int:
    """Rows of a chunk where ``rows`` are cut into as few chunks of at most ``limit`` as will do, all about as large."""
    limit = max(1, limit)
    chunks = max(1, -(-rows // limit))
    even = -(-rows // chunks)
    return max(1, min(limit, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE, rows))


def cut(
    rows: int, columns: int, shards: int, width: int, operand_bytes: int, wide_bytes: int, budget: int
) -> tuple[int, int, int]:
    """How ``rows`` are cut where gradients are formed: (buffers, rows of a chunk, bytes of a row in flight).

    In flight are a row's logits and x_j, per buffer, and dx_j. Under a group there is a second buffer for the next
    chunk's, unless one takes all rows. What decides is known to every rank, since each chunk is a collective.

    Args:
        columns: of the vocabulary, over all ``shards``.
        width: hidden units of all specialists.
    """
    inputs, d_inputs = -(-columns // shards) * wide_bytes + width * operand_bytes, width * wide_bytes
    buffers = 1 if shards == 1 or rows * (inputs + d_inputs) <= budget else 2
    row_bytes = buffers * inputs + d_inputs
    return buffers, even_rows(rows, budget // row_bytes), row_bytes


def pitch(columns: int, device: torch.device) -> int:
    """How many numbers lie between the rows of a buffer of logits."""
    return -(-columns // PITCH_MULTIPLE) * PITCH_MULTIPLE + (HOST_PITCH_EXTRA if device.type == "cpu" else 0)


def column_blocks(columns: int, most: int) -> list[slice]:
    """``columns`` cut into consecutive blocks of ``most``, the last one what remains; of no columns one empty block."""
    return [slice(first, min(first + most, columns)) for first in range(0, columns, max(most, 1))] or [slice(0, 0)]


def block_columns(columns: int, device: torch.device, operand_bytes: int, wide_bytes: int) -> int:
    """Columns of a block where gradients are formed in the logits' place: on a CPU, unless they are narrower there, so
    many that what one step writes is in a cache when the next one reads it; else all of them."""
    return BLOCK_COLUMNS["cpu"] if device.type == "cpu" and operand_bytes == wide_bytes else columns


def _block_columns(problem: Problem) -> int:
    return min(max(problem.real_rows, 1), BLOCK_COLUMNS.get(problem.target.device.type, BLOCK_COLUMNS["cuda"]))


def statistics_row_bytes(problem: Problem, apart: bool, operand_bytes: int) -> int:
    """What forward_statistics holds per row in flight: a block's logits, and the scaled inputs unless ``apart``."""
    planes = len(problem.hidden) if apart else 1
    width = 0 if apart else sum(states.shape[1] for states in problem.hidden)
    return planes * _block_columns(problem) * problem.gate_logits.element_size() + width * operand_bytes


def forward_statistics(
    problem: Problem, epilogue: Epilogue, buffer_bytes: int, apart: Tensor | None = None, each: bool = False
) -> Tensor:
    """Statistics over the whole vocabulary (statistics.py).

    Args:
        buffer_bytes: bound on the logits and scaled inputs of a chunk.
        apart: None to mix the specialists before the product. Or the gate weights (N, n), finite on ignored rows: keep
            n logit planes and return the specialists' statistics, too.
        each: with ``apart``, return the statistics of the planes' mean and of every plane alone instead: to the
            collective under a group the n + 2 models are so many more rows.

    Returns:
        (N, 4); (N, 4 + 3 n) with what the gate's gradient needs of the specialists; ((2 + n) N, 4) of each model, one
        after the other: the mixture, the mean, every plane.
    """
    n, real, kept = len(problem.hidden), problem.real_rows, problem.kept()
    planes, models = 1 if apart is None else n, 2 + n if each else 1
    gate_logits = problem.gate_logits
    columns = _block_columns(problem)
    row_bytes = statistics_row_bytes(problem, apart is not None, epilogue.operand_dtype.itemsize)
    if gate_logits.device.type == "cpu":
        buffer_bytes = min(buffer_bytes, HOST_BLOCK_BYTES)
    chunk_rows = even_rows(problem.rows, buffer_bytes // row_bytes)
    buffer = gate_logits.new_empty((planes, chunk_rows, pitch(columns, gate_logits.device)))
    numbers = COLUMNS if apart is None or each else COLUMNS + 3 * n
    statistics = gate_logits.new_empty((models, problem.rows, numbers))
    firsts = range(0, max(real, 1), columns)
    targets = local_columns(problem.local_target(), len(firsts), columns)
    for start in range(0, problem.rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, problem.rows))
        inputs = [states[rows] for states in problem.hidden]  # NaN in an ignored row stays in that row's statistics
        if apart is None:
            _, inputs = gate_scale.scale_inputs(gate_logits[rows], kept[rows], inputs, epilogue.operand_dtype)
        blocks = []
        for first, target in zip(firsts, targets, strict=True):
            last, column = min(first + columns, real), target[rows]
            logits = buffer[:, : rows.stop - rows.start, : last - first]  # (planes, C, B)
            for j, (x, head) in enumerate(zip(inputs, problem.heads, strict=True)):
                plane = logits[0 if apart is None else j]
                gemm.accumulate(plane, x, head[first:last].t(), add=j > 0 and apart is None)
            if apart is None:
                block, _ = epilogue.statistics(logits[0], column, keep=False)
            else:
                block = epilogue.mixture_statistics(logits, apart[rows], column)
            if each:
                alone = [epilogue.statistics(plane, column, keep=False)[0] for plane in logits]
                mean = epilogue.statistics(_mean_in_place(logits), column, keep=False)[0]
                block = torch.cat([block[:, :COLUMNS], mean, *alone])  # ((2 + n) C, 4)
            blocks.append(block)
        statistics[:, rows] = union(blocks, columns, real).view(models, -1, numbers)
    return PendingStatistics(statistics.flatten(0, 1), real, problem.settings).wait()


def local_columns(target: Tensor, blocks: int, columns: int) -> Tensor:
    """(blocks, N): the target's column in each block of so many columns, -1 where it lies in another.

    target (N,): its column among all of them, or -1.
    """
    if blocks == 1:
        return target[None]
    column = target - columns * torch.arange(blocks, device=target.device)[:, None]
    return column.masked_fill_((column < 0) | (column >= columns), -1)


def _mean_in_place(planes: Tensor) -> Tensor:
    """(C, B) of (n, C, B), in the first plane's memory: nobody asks for the planes again."""
    mean = planes[0]
    for plane in planes[1:]:
        mean += plane
    mean /= len(planes)
    return mean


def union(blocks: list[Tensor], columns: int, real: int) -> Tensor:
    """Statistics of ``real`` columns from those of consecutive blocks of ``columns``, the last one what remains."""
    if len(blocks) == 1:  # perhaps of no columns at all, which only other shards can complete
        return blocks[0]
    firsts = torch.arange(0, real, columns, device=blocks[0].device)[:, None]
    return combine(torch.stack(blocks), (real - firsts).clamp(max=columns))
