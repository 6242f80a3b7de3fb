"""The mixture cross-entropy without logits in memory: Triton tiles forward, bounded workspace backward.

Forward: streaming_kernels.statistics_kernel; a few numbers per row and split of the vocabulary reach memory, and the
inputs are all that is saved. With frozen hidden states and heads the same sweep yields the gate's gradient.

Backward: one block of vocabulary columns at a time. dz of the block is recomputed in tiles into a workspace of at most
WORKSPACE_BYTES; the vendor GEMM then takes
    dx_j += dz W_j[block]       summed over the blocks in fp32
    dW_j[block] = dz^T x_j      complete at once: no accumulator, rounded once
4 GEMM passes in all, whatever the reduction: the upstream factors are known before any gradient is formed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gate_only, gate_scale, gemm
from ultrafuser_mega.ops.chunked import FP16_SCALE, Needs
from ultrafuser_mega.ops.problem import Problem
from ultrafuser_mega.ops.statistics import (
    COLUMNS,
    MAX,
    PendingStatistics,
    combine,
    dlogit_coefficients,
    row_loss,
)
from ultrafuser_mega.ops.streaming_kernels import dlogits_kernel, statistics_kernel

SPLIT_COLUMNS = 4096  # fixed: a row's sums must not depend on how many rows come with it
WORKSPACE_BYTES = 64 << 20

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by compute capability: the largest found that do not spill registers
# (tests/unit/ops/test_streaming.py holds it); compiled, not yet timed on hardware. With PER_SPECIALIST the tiles of
# all specialists are alive at once: the table is for up to three.
MIXED = {80: (128, 128, 32, 8, 3), 90: (128, 128, 64, 8, 3), 100: (128, 64, 64, 8, 3)}
PER_SPECIALIST = {80: (64, 64, 32, 8, 4), 90: (64, 128, 64, 8, 3), 100: (64, 64, 64, 8, 4)}


def tile(capability: int, specialists_apart: int) -> tuple[int, int, int, int, int]:
    """The table's entry for a GPU and the number of specialists whose tiles are kept apart (0: they are mixed).

    A generation without an entry takes that of the newest older one.
    """
    table = PER_SPECIALIST if specialists_apart else MIXED
    block_m, block_n, block_k, warps, stages = table[
        max(known for known in table if known <= max(capability, min(table)))
    ]
    if specialists_apart > 3:
        block_n = 32
    return block_m, block_n, block_k, warps, stages


def mixture_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient). bf16, fp16 or fp32 tensors on a GPU."""
    trainable = torch.is_grad_enabled() and any(t.requires_grad for t in (*problem.hidden, *problem.heads))
    if not trainable and torch.is_grad_enabled() and problem.gate_logits.requires_grad:
        return gate_only.GateOnlyLoss.apply(problem, gate_statistics, problem.gate_logits)
    return _StreamingLoss.apply(
        problem.settings, torch.is_grad_enabled(), problem.target, problem.gate_logits, *problem.hidden, *problem.heads
    )


def gate_statistics(problem: Problem, gate_weights: Tensor) -> Tensor:
    """(N, 4 + 3 n) over the whole vocabulary."""
    return statistics(problem, gate_weights, per_specialist=True)


def statistics(problem: Problem, gate_weights: Tensor, *, per_specialist: bool) -> Tensor:
    """Statistics of every row over the whole vocabulary (statistics.py). gate_weights (N, n) fp32."""
    n, rows, real = len(problem.hidden), problem.rows, problem.real_rows
    width = COLUMNS + (3 * n if per_specialist else 0)
    splits = max(1, -(-real // SPLIT_COLUMNS))
    parts = gate_weights.new_zeros((splits, rows, width))
    parts[:, :, MAX] = float("-inf")
    parts[:, :, 2] = float("-inf")
    if rows and real:
        block_m, block_n, block_k, warps, stages = tile(_capability(gate_weights), n if per_specialist else 0)
        statistics_kernel[(triton.cdiv(rows, block_m), splits)](
            *_operands(problem),
            gate_weights,
            problem.local_target(),
            parts,
            rows,
            real,
            SPLIT_COLUMNS,
            n=n,
            PER_SPECIALIST=per_specialist,
            SMOOTHING=problem.settings.label_smoothing > 0,
            EVEN_K=_even(problem, block_k),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    columns = parts.new_full((splits, 1), SPLIT_COLUMNS)
    columns[-1] = real - (splits - 1) * SPLIT_COLUMNS
    local = parts[0] if splits == 1 else combine(parts, columns)
    return PendingStatistics(local, real, problem.settings).wait()


def dlogits(
    problem: Problem,
    gate_weights: Tensor,
    row_max: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    block: slice,
    out: Tensor,
) -> None:
    """dz of the local columns ``block`` into out (N, columns of the block)."""
    block_m, block_n, block_k, warps, stages = tile(_capability(gate_weights), 0)
    grid = (triton.cdiv(problem.rows, block_m), triton.cdiv(block.stop - block.start, block_n))
    dlogits_kernel[grid](
        *_operands(problem),
        gate_weights,
        problem.local_target(),
        row_max.contiguous(),
        *(coefficient.contiguous() for coefficient in coefficients),
        out,
        problem.rows,
        block.start,
        block.stop,
        out.stride(0),
        n=len(problem.hidden),
        EVEN_K=_even(problem, block_k),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )


def _operands(problem: Problem) -> tuple[Any, ...]:
    hidden = tuple(_rows_contiguous(states) for states in problem.hidden)
    heads = tuple(_rows_contiguous(head) for head in problem.heads)
    return (
        hidden,
        heads,
        tuple(states.stride(0) for states in hidden),
        tuple(head.stride(0) for head in heads),
        tuple(states.shape[1] for states in hidden),
    )


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _even(problem: Problem, block_k: int) -> bool:
    return all(states.shape[1] % block_k == 0 for states in problem.hidden)


def _capability(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 80  # Triton's interpreter
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


class _StreamingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Any, grad_enabled: bool, target: Tensor, gate_logits: Tensor, *tensors: Tensor):
        n = len(tensors) // 2
        problem = Problem(tensors[:n], tensors[n:], gate_logits, target, settings)
        wanted = ctx.needs_input_grad[3:] if grad_enabled else (False,) * (1 + 2 * n)
        ctx.needs = Needs(wanted[0], tuple(wanted[1 : 1 + n]), tuple(wanted[1 + n :]))
        ctx.settings = settings
        kept = problem.kept()
        rows = statistics(problem, gate_softmax(problem), per_specialist=False)
        row_losses = row_loss(rows, kept, settings)
        loss = row_losses.clone() if settings.reduction == "none" else row_losses.sum()
        if settings.reduction == "mean":
            loss = loss / kept.sum().clamp(min=1)
        ctx.save_for_backward(rows, target, gate_logits, *tensors)
        ctx.mark_non_differentiable(row_losses)
        ctx.set_materialize_grads(False)
        return loss, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor | None, _row_losses: None):
        rows, target, gate_logits, *tensors = ctx.saved_tensors
        n = len(tensors) // 2
        if upstream is None:
            return (None,) * (4 + 2 * n)
        problem = Problem(tuple(tensors[:n]), tuple(tensors[n:]), gate_logits, target, ctx.settings)
        kept = problem.kept()
        weight = torch.where(kept, upstream, 0.0)
        if ctx.settings.reduction == "mean":
            weight = weight / kept.sum().clamp(min=1)
        return None, None, None, *_gradients(problem, ctx.needs, rows, weight)


def gate_softmax(problem: Problem) -> Tensor:
    """w (N, n); that of equal gate logits on ignored rows, whatever those hold."""
    return torch.softmax(problem.gate_logits.masked_fill(~problem.kept()[:, None], 0.0), dim=1)


def _gradients(problem: Problem, needs: Needs, rows: Tensor, weight: Tensor) -> list[Tensor | None]:
    """Of gate logits, hidden states and heads, in this order. rows (N, 4): statistics; weight (N,)."""
    real, count = problem.real_rows, problem.rows
    dtype = problem.hidden[0].dtype
    gate_weights, kept = gate_softmax(problem), problem.kept()
    # fp16 holds neither small probabilities nor large upstream factors: dz is kept near 1 and scaled back afterwards
    scale, factor = 1.0, None
    if dtype == torch.float16 and count:
        scale, factor = FP16_SCALE, weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        weight = weight / factor
    coefficients = dlogit_coefficients(rows, weight * scale, problem.settings)

    wide = [weight.new_zeros(states.shape) for states in problem.hidden] if needs.gate or any(needs.hidden) else []
    heads = [
        torch.zeros_like(head, memory_format=torch.contiguous_format) if need else None
        for head, need in zip(problem.heads, needs.heads, strict=True)
    ]
    block_columns = max(1, min(real, WORKSPACE_BYTES // (max(1, count) * dtype.itemsize) // 128 * 128 or 1))
    workspace = torch.empty((count, block_columns), dtype=dtype, device=weight.device)
    for first in range(0, real if count else 0, block_columns):
        block = slice(first, min(first + block_columns, real))
        dz = workspace[:, : block.stop - first]
        dlogits(problem, gate_weights, rows[:, MAX], coefficients, block, dz)
        for j, states in enumerate(problem.hidden):
            if wide:
                gemm.accumulate(wide[j], dz, problem.heads[j][block], add=True, alpha=1.0 / scale)
            total = heads[j]
            if total is not None:
                x = (states * gate_weights[:, j, None]).masked_fill_(~kept[:, None], 0.0).to(dtype)
                part = total[block] if factor is None else total[block].float()
                gemm.accumulate(part, dz.t(), x, add=False, alpha=1.0 / scale)
                if factor is not None:
                    total[block] = part * factor

    if factor is not None:
        for dx in wide:
            dx.mul_(factor)
    gate = torch.empty_like(gate_weights) if needs.gate else None
    hidden = [
        torch.empty_like(states, memory_format=torch.contiguous_format) if need else None
        for states, need in zip(problem.hidden, needs.hidden, strict=True)
    ]
    if wide:
        gate_scale.unscale_gradients(gate_weights, kept, problem.hidden, wide, hidden, gate)
    if gate is not None and problem.settings.group is not None and count:
        dist.all_reduce(gate, group=problem.settings.group)
    return [gate, *hidden, *heads]
