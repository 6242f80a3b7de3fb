"""The mixture cross-entropy on a small shard of the vocabulary: every specialist's logits apart, nothing scaled twice.

Scaling the inputs, x_j = w_j h_j, and un-scaling their gradients (chunked.py) moves so many bytes per hidden unit,
however few words a shard has. Where words are few, the gate's weights meet the logits instead:
    o_j = h_j W_j^T                       n GEMMs, each into an fp32 plane of its own (N, R)
    z = sum_j w_j o_j and its statistics  epilogue.py, in one sweep; under a group one collective of 20 + 12 n bytes
                                          per row, from which the gate's whole gradient follows (statistics.py)
    dz_j = w_j dz over o_j                epilogue.py, in place, in the backward, which knows the upstream gradient
    dh_j = dz_j W_j,  dW_j = dz_j^T h_j   straight into the gradients
That is 3 GEMM passes for every reduction. Hidden states reach the products as they are, so no logit carries a rounding
of w_j h_j; h_j is copied once, an ignored row as zeros, since 0 dz of a row that holds NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gemm
from ultrafuser_mega.ops.epilogue import Epilogue
from ultrafuser_mega.ops.forward import pitch
from ultrafuser_mega.ops.problem import Needs, Problem
from ultrafuser_mega.ops.statistics import (
    COLUMNS,
    MAX,
    PendingStatistics,
    dlogit_coefficients,
    gate_gradient,
    row_loss,
)


def row_bytes(columns: int, widths: Sequence[int], operand_bytes: int, wide_bytes: int) -> int:
    """What a row holds beyond the gradients: its n logits of each column, and one specialist's hidden state again."""
    return len(widths) * columns * wide_bytes + max(widths) * operand_bytes


def pay(columns: int, widths: Sequence[int], operand_bytes: int, wide_bytes: int) -> bool:
    """Whether n planes of so many ``columns`` move fewer bytes than scaling and un-scaling hidden states does.

    A column's logit is read twice and written once per plane instead of once. A hidden unit is read and written once,
    where x_j, dx_j and dh_j would be: h and x twice, dx, and h and dh.
    """
    planes = (len(widths) - 1) * columns * (2 * wide_bytes + operand_bytes)
    return planes < sum(widths) * (2 * operand_bytes + wide_bytes)


def serve(problem: Problem, epilogue: Epilogue, buffer_bytes: int) -> bool:
    """Whether the planes pay and fit, by what all ranks of a group know. fp16 has no room for small weights in dz."""
    widths, dtype = [states.shape[1] for states in problem.hidden], problem.hidden[0].dtype
    columns = -(-problem.settings.vocab_size // problem.settings.shards)
    sizes = columns, widths, epilogue.operand_dtype.itemsize, problem.accumulate_dtype.itemsize
    return dtype != torch.float16 and pay_and_fit(problem.rows, *sizes, buffer_bytes)


def pay_and_fit(
    rows: int, columns: int, widths: Sequence[int], operand_bytes: int, wide_bytes: int, buffer_bytes: int
) -> bool:
    """Whether planes of so many rows move fewer bytes and are within the budget."""
    sizes = columns, widths, operand_bytes, wide_bytes
    return 0 < rows * row_bytes(*sizes) <= buffer_bytes and pay(*sizes)


def mixture_loss(
    problem: Problem, needs: Needs, epilogue: Epilogue, head_main_grad: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient). head_main_grad: n x (V_local, d_j) or None, as in chunked.py."""
    plan = _Plan(problem, needs, epilogue, head_main_grad)
    return _PlanesLoss.apply(plan, problem.target, problem.gate_logits, *problem.hidden, *problem.heads)


class _Plan:
    """What the autograd node carries besides tensors."""

    def __init__(
        self, problem: Problem, needs: Needs, epilogue: Epilogue, head_main_grad: Sequence[Tensor | None]
    ) -> None:
        self.settings, self.needs, self.epilogue = problem.settings, needs, epilogue
        self.main_grad = tuple(head_main_grad) or (None,) * len(problem.heads)

    def problem(self, target: Tensor, gate_logits: Tensor, tensors: Sequence[Tensor]) -> Problem:
        n = len(tensors) // 2
        return Problem(tuple(tensors[:n]), tuple(tensors[n:]), gate_logits, target, self.settings)


def _logits(problem: Problem) -> Tensor:  # (n, N, R)
    between = pitch(problem.real_rows, problem.target.device)
    buffer = problem.gate_logits.new_empty((len(problem.hidden), problem.rows, between))
    planes = buffer[:, :, : problem.real_rows]
    for plane, states, head in zip(planes, problem.hidden, problem.heads, strict=True):
        gemm.accumulate(plane, states, head[: problem.real_rows].t(), add=False)
    return planes


class _PlanesLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, target: Tensor, gate_logits: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        problem, settings = plan.problem(target, gate_logits, tensors), plan.settings
        kept = problem.kept()
        gate_weights = torch.softmax(gate_logits.masked_fill(~kept[:, None], 0.0), dim=1)
        planes = _logits(problem)
        local = plan.epilogue.mixture_statistics(planes, gate_weights, problem.local_target())
        statistics = PendingStatistics(local, problem.real_rows, settings).wait()  # (N, 4 + 3 n)
        row_losses = row_loss(statistics, kept, settings)
        loss = row_losses.clone() if settings.reduction == "none" else row_losses.sum()
        if settings.reduction == "mean":
            loss = loss / kept.sum().clamp(min=1)
        ctx.plan, ctx.planes = plan, planes
        ctx.save_for_backward(target, gate_weights, statistics, gate_logits, *tensors)
        ctx.mark_non_differentiable(row_losses)
        ctx.set_materialize_grads(False)
        return loss, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _row_losses: None) -> tuple[Tensor | None, ...]:
        plan, needs = ctx.plan, ctx.plan.needs
        target, gate_weights, statistics, gate_logits, *tensors = ctx.saved_tensors
        if upstream is None:
            return (None,) * (3 + len(tensors))
        problem = plan.problem(target, gate_logits, tensors)
        planes, ctx.planes = ctx.planes, None
        if planes is None:  # a second backward of the same graph
            planes = _logits(problem)
        kept = problem.kept()
        weight = torch.where(kept, upstream, 0.0)
        if plan.settings.reduction == "mean":
            weight = weight / kept.sum().clamp(min=1)
        gate = gate_gradient(statistics, gate_weights, weight, plan.settings) if needs.gate else None
        if not any(needs.hidden) and not any(needs.heads):
            return None, None, gate, *(None,) * len(tensors)
        coefficients = dlogit_coefficients(statistics[:, :COLUMNS], weight, plan.settings)
        dz = plan.epilogue.mixture_dlogits(  # (n, N, R)
            planes, gate_weights, problem.local_target(), statistics[:, MAX], coefficients
        )
        hidden = [
            _product(d, head[: problem.real_rows], torch.empty_like(states, memory_format=torch.contiguous_format))
            if need
            else None
            for d, head, states, need in zip(dz, problem.heads, problem.hidden, needs.hidden, strict=True)
        ]
        heads = [
            _head_gradient(d, torch.where(kept[:, None], states, 0.0), head, main) if need else None
            for d, states, head, main, need in zip(
                dz, problem.hidden, problem.heads, plan.main_grad, needs.heads, strict=True
            )
        ]
        return None, None, gate, *hidden, *heads


def _head_gradient(dz: Tensor, states: Tensor, head: Tensor, main: Tensor | None) -> Tensor | None:
    """dW_j (V_local, d_j) from dz_j (N, R) and h_j (N, d_j), ignored rows zero; None where it is added to ``main``."""
    real = dz.shape[1]
    if main is not None:
        gemm.accumulate(main[:real], dz.t(), states, add=True)
        return None
    total = torch.empty_like(head, memory_format=torch.contiguous_format)
    total[real:].zero_()  # padding
    _product(dz.t(), states, total[:real])
    return total


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, rounded once. Where 16 bits are upcast (gemm.py), a is wider than ``out``."""
    if a.dtype == out.dtype:
        gemm.accumulate(out, a, b, add=False)
        return out
    wide = torch.empty_like(out, dtype=a.dtype)
    gemm.accumulate(wide, a, b, add=False)
    return out.copy_(wide)
