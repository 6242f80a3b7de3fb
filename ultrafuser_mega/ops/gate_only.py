"""Stage 1 of the paper: the specialists are frozen, only the gate trains. Loss and gate gradient in ONE GEMM pass.

Since dw_j = sum_v dz_v o_jv is an expectation of specialist j's own logits, it comes out of the same sweep over the
vocabulary as the softmax, as a running sum beside the sum-exp (statistics.py has the algebra). No backward GEMM:
2 N V K FLOPs instead of 6. The gradient is linear in the upstream gradient row by row, so every reduction is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops.epilogue import Epilogue, epilogue_for
from ultrafuser_mega.ops.forward import buffer_budget, forward_statistics
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import gate_gradient, row_loss


def mixture_loss(
    problem: Problem, *, buffer_bytes: int | None = None, epilogue: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient); differentiable in the gate logits alone.

    ``buffer_bytes`` bounds the logit buffer; the default suits the device.
    """
    hidden = problem.hidden[0]
    epilogue = epilogue or epilogue_for(hidden.device, hidden.dtype)
    budget = buffer_bytes or buffer_budget(hidden.device)

    def statistics_of(problem: Problem, gate_weights: Tensor) -> Tensor:
        return forward_statistics(problem, epilogue, budget, apart=gate_weights)

    return GateOnlyLoss.apply(problem, statistics_of, problem.gate_logits)


class GateOnlyLoss(torch.autograd.Function):
    """(loss, row losses) from statistics_of(problem, gate_weights (N, n)) -> (N, 4 + 3 n), in chunks or streamed."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, statistics_of: Callable[[Problem, Tensor], Tensor], gate_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = problem.kept()
        gate_weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), dim=1)
        statistics = statistics_of(problem, gate_weights)
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
    def backward(ctx: Any, upstream: Tensor | None, _row_losses: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * upstream.reshape(-1, 1)
