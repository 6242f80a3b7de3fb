"""The mixture cross-entropy written down plainly: the definition that every other backend is tested against.

Plain PyTorch operations and autograd, in fp32 (fp64 for fp64 inputs); it holds all n logit tensors. Under a group the
softmax is put together by three differentiable collectives, as in Megatron-LM's vocab-parallel cross-entropy.
Not for training: slow and large on purpose.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops.problem import Problem, check_shards, readable


def row_losses(problem: Problem) -> Tensor:
    """(N,) loss of every row, 0 where it is ignored; differentiable in hidden, heads and gate logits."""
    settings, dtype = problem.settings, problem.accumulate_dtype
    if settings.group is not None and readable(problem.target):
        columns = torch.tensor(problem.real_rows)
        dist.all_reduce(columns, group=settings.group)
        check_shards(int(columns), settings.vocab_size)
    kept = problem.kept()
    ignored = ~kept[:, None]
    gate_logits = _SumGradients.apply(problem.gate_logits, settings.group)
    weights = torch.softmax(gate_logits.masked_fill(ignored, 0.0), dim=1)  # (N, n)
    logits = sum(  # (N, R)
        weights[:, j, None] * (states.to(dtype).masked_fill(ignored, 0.0) @ head[: problem.real_rows].to(dtype).t())
        for j, (states, head) in enumerate(zip(problem.hidden, problem.heads, strict=True))
    )
    assert isinstance(logits, Tensor)

    top = logits.new_full((problem.rows,), float("-inf"))
    if problem.real_rows:
        top = logits.detach().amax(1)
    if settings.group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=settings.group)
    shifted = logits - top[:, None]
    log_sum = _sum_over_shards(shifted.exp().sum(1), settings.group).log()
    column = problem.local_target()
    here = column >= 0
    target = shifted.new_zeros(problem.rows)
    if problem.real_rows:
        target = torch.where(here, shifted.gather(1, column.clamp(min=0)[:, None]).squeeze(1), 0.0)
    loss = log_sum - (1.0 - settings.label_smoothing) * _sum_over_shards(target, settings.group)
    if settings.label_smoothing:
        mean = _sum_over_shards(shifted.sum(1), settings.group) / settings.vocab_size
        loss = loss - settings.label_smoothing * mean
    if settings.z_loss:
        loss = loss + settings.z_loss * (top + log_sum).square()
    return torch.where(kept, loss, 0.0)


def _sum_over_shards(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return _SumValues.apply(value, group)


class _SumValues(torch.autograd.Function):
    """Sum over the group; the gradient, equal on all ranks, goes to every summand."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            return value.view_as(value)
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumGradients(torch.autograd.Function):
    """Identity on a replicated tensor; its gradient is the sum of every rank's part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.group is not None:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
