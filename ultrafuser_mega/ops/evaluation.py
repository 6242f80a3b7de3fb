"""Losses of the fused model and of every specialist alone, from one product per head.

Asking the loss once for the mixture and once for each specialist takes every head's product twice. Here each block of
logit planes, one per specialist, is looked at n + 1 times instead: mixed by the gate and plane by plane. To the
collective under a group the n + 1 models are so many more rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops import gemm
from ultrafuser_mega.ops.epilogue import epilogue_for
from ultrafuser_mega.ops.forward import BLOCK_COLUMNS, HOST_BLOCK_BYTES, buffer_budget, even_rows, union
from ultrafuser_mega.ops.problem import checked_problem
from ultrafuser_mega.ops.statistics import COLUMNS, PendingStatistics, row_loss


@torch.no_grad()
def cross_entropy_of_each(
    hidden: list[Tensor],  # n x (N, d_j)
    head_weight: list[Tensor],  # n x (V_local, d_j)
    gate_logits: Tensor,  # (N, n)
    target: Tensor,  # (N,)
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Plain cross-entropy of every row, without gradients.

    Args:
        hidden, head_weight, gate_logits, target, group, vocab_start, vocab_size, ignore_index: as
            :func:`~ultrafuser_mega.ops.loss.mixture_cross_entropy` takes them.

    Returns:
        (1 + n, N) fp32 (fp64 for fp64 inputs): of the mixture, then of each specialist alone; 0 on ignored rows.

    Raises:
        InputError: shapes, types, devices or settings that do not fit.
    """
    problem = checked_problem(
        hidden,
        head_weight,
        gate_logits,
        target,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=0.0,
        z_loss=0.0,
    )
    n, real, kept, device = len(problem.hidden), problem.real_rows, problem.kept(), target.device
    epilogue = epilogue_for(device, problem.hidden[0].dtype)
    gate_weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), dim=1)
    columns = min(max(real, 1), BLOCK_COLUMNS.get(device.type, BLOCK_COLUMNS["cuda"]))
    budget = min(buffer_budget(device), HOST_BLOCK_BYTES) if device.type == "cpu" else buffer_budget(device)
    chunk_rows = even_rows(problem.rows, budget // (n * columns * gate_logits.element_size()))
    buffer = gate_logits.new_empty((n, chunk_rows, columns))
    statistics = gate_logits.new_empty((1 + n, problem.rows, COLUMNS))
    local_target = problem.local_target()
    for start in range(0, problem.rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, problem.rows))
        blocks = []
        for first in range(0, max(real, 1), columns):
            last = min(first + columns, real)
            planes = buffer[:, : rows.stop - rows.start, : last - first]  # (n, C, B)
            for plane, states, head in zip(planes, problem.hidden, problem.heads, strict=True):
                gemm.accumulate(plane, states[rows], head[first:last].t(), add=False)
            here = (local_target[rows] >= first) & (local_target[rows] < last)
            column = (local_target[rows] - first).masked_fill(~here, -1)
            mixed = epilogue.mixture_statistics(planes, gate_weights[rows], column)[:, :COLUMNS]
            alone = [epilogue.statistics(plane, column, keep=False)[0] for plane in planes]
            blocks.append(torch.cat([mixed, *alone]))  # ((1 + n) C, 4)
        statistics[:, rows] = union(blocks, columns, real).view(1 + n, -1, COLUMNS)
    whole = PendingStatistics(statistics.flatten(0, 1), real, problem.settings).wait()
    return row_loss(whole, kept.repeat(1 + n), problem.settings).view(1 + n, -1)
