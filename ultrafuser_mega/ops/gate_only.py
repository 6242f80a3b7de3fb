"""Stage 1 of the paper: the specialists are frozen, only the gate trains. Loss and gate gradient in ONE GEMM pass.

Since dw_j = sum_v dz_v o_jv is an expectation of specialist j's own logits, it comes out of the same sweep over the
vocabulary as the softmax, as a running sum beside the sum-exp (statistics.py has the algebra). No backward GEMM:
2 N V K FLOPs instead of 6. The gradient is linear in the upstream gradient row by row, so every reduction is exact.

In row chunks as in chunked.py, but with n logit planes side by side: the mixture needs each specialist's logits.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gemm
from ultrafuser_mega.ops.chunked import PITCH_MULTIPLE, Plan
from ultrafuser_mega.ops.epilogue import Epilogue
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import COLUMNS, PendingStatistics, gate_gradient, row_loss


def mixture_loss(
    problem: Problem, *, buffer_bytes: int | None = None, epilogue: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient); differentiable in the gate logits alone."""
    plan = Plan(problem, buffer_bytes, epilogue, planes=len(problem.hidden))
    return _GateOnlyLoss.apply(problem, plan, problem.gate_logits)


def mixture_statistics(problem: Problem, plan: Plan, gate_weights: Tensor) -> Tensor:
    """(N, 4 + 3 n) of the whole vocabulary. gate_weights (N, n)."""
    n, real = len(problem.hidden), problem.real_rows
    pitch = -(-real // PITCH_MULTIPLE) * PITCH_MULTIPLE
    buffers = gate_weights.new_empty((plan.buffers, n, plan.chunk_rows, pitch))
    statistics = gate_weights.new_empty((problem.rows, COLUMNS + 3 * n))
    target, ignored = problem.local_target(), ~problem.kept()[:, None]
    travelling: deque[tuple[slice, PendingStatistics]] = deque()
    for index, rows in enumerate(plan.chunks(problem.rows)):
        logits = buffers[index % plan.buffers, :, : rows.stop - rows.start, :real]  # (n, C, R)
        for j, (states, head) in enumerate(zip(problem.hidden, problem.heads, strict=True)):
            x = states[rows].masked_fill(ignored[rows], 0.0)  # what an ignored row holds must not matter
            gemm.accumulate(logits[j], x, head[:real].t(), add=False)
        local = plan.epilogue.mixture_statistics(logits, gate_weights[rows], target[rows])
        travelling.append((rows, PendingStatistics(local, real, problem.settings)))
        while len(travelling) >= plan.buffers:
            _arrive(statistics, *travelling.popleft())
    while travelling:
        _arrive(statistics, *travelling.popleft())
    return statistics


def _arrive(statistics: Tensor, rows: slice, pending: PendingStatistics) -> None:
    statistics[rows] = pending.wait()


class _GateOnlyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, plan: Plan, gate_logits: Tensor):
        kept = problem.kept()
        gate_weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), dim=1)
        statistics = mixture_statistics(problem, plan, gate_weights)
        row_losses = row_loss(statistics, kept, problem.settings)
        weight = kept.to(row_losses.dtype)
        loss = row_losses.clone() if problem.settings.reduction == "none" else row_losses.sum()
        if problem.settings.reduction == "mean":
            share = weight.sum().clamp(min=1.0).reciprocal()
            weight, loss = weight * share, loss * share
        ctx.save_for_backward(gate_gradient(statistics, gate_weights, weight, problem.settings))
        ctx.mark_non_differentiable(row_losses)
        ctx.set_materialize_grads(False)
        return loss, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor | None, _row_losses: None):
        if upstream is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * upstream.reshape(-1, 1)
