"""The mixture cross-entropy without logits in memory: Triton tiles forward, a bounded workspace backward.

Forward: streaming_kernels.statistics_kernel; a few numbers per row and split of the vocabulary reach memory, and the
inputs are all that is saved. With frozen hidden states and heads the same sweep yields the gate's gradient.

Backward: dz is recomputed in tiles, blocks of it go to a workspace, the vendor's GEMM takes the products. A gradient
that sums over rows and one that sums over the vocabulary would each want the other's fp32 sums in memory, so each has a
loop of its own, in which one block of its rows is finished before the next begins:
    dW_j[block] = dz^T x_j              per block of the vocabulary, all rows in one product; x_j lies where dh_j will,
                                        or beside the workspace where hidden states are frozen
    dx_j[rows] += dz W_j[block]         per block of rows, fp32 sums of that block alone
Passes: 1 forward, 2 for each of the two gradients. The upstream factors are known before any gradient is formed, so
every reduction is served alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gate_only, gate_scale, gemm
from ultrafuser_mega.ops.chunked import FP16_SCALE
from ultrafuser_mega.ops.operators import launch_operator
from ultrafuser_mega.ops.problem import Needs, Problem
from ultrafuser_mega.ops.statistics import (
    COLUMNS,
    MAX,
    PendingStatistics,
    combine,
    dlogit_coefficients,
    row_loss,
)
from ultrafuser_mega.ops.streaming_kernels import dlogits_kernel, gate_statistics_kernel, statistics_kernel
from ultrafuser_mega.ops.streaming_tiles import Tile, has_tiny, launch

SPLIT_COLUMNS = 4096  # of the vocabulary, walked by one program at most
SPLITS = 8  # at least, so that a small vocabulary fills a GPU, too
SPLIT_MULTIPLE = 256  # whole tiles
# backward, with room below 64 MiB for what has one number per row
WORKSPACE_BYTES = 56 << 20
TILE_COLUMNS = 8192  # of dz beside the fp32 sums of a block of rows: enough programs to fill a GPU
MULTIPLE = 128  # rows or columns of a block: whole tiles


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
    split = split_columns(real)
    splits = max(1, -(-real // split))
    parts = gate_weights.new_zeros((splits, rows, width))
    parts[:, :, MAX] = float("-inf")
    parts[:, :, 2] = float("-inf")
    if rows and real:
        _fill_statistics(
            problem.hidden, problem.heads, gate_weights, problem.local_target(), parts, real, split, per_specialist
        )
    columns = parts.new_full((splits, 1), split)
    columns[-1] = real - (splits - 1) * split
    local = parts[0] if splits == 1 else combine(parts, columns)
    return PendingStatistics(local, real, problem.settings).wait()


@launch_operator(
    "streaming_statistics(Tensor[] hidden, Tensor[] heads, Tensor gate_weights, Tensor target, Tensor(a!) parts,"
    " int columns, int split, bool per_specialist)"
)
def _fill_statistics(
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    gate_weights: Tensor,
    target: Tensor,
    parts: Tensor,  # (splits, N, width) out
    columns: int,
    split: int,
    per_specialist: bool,
) -> None:
    splits, rows, _ = parts.shape

    def programs(tile: Tile) -> int:
        return int(triton.cdiv(rows, tile.block_m)) * splits

    def rest(tile: Tile) -> tuple[Any, ...]:
        tiny = () if per_specialist else (has_tiny(gate_weights, tile.block_m),)
        return gate_weights, target, *tiny, parts, rows, columns, split

    name, kernel = "statistics", statistics_kernel
    if per_specialist:
        name, kernel = "gate statistics", gate_statistics_kernel
    launch(name, kernel, programs, hidden, heads, rest)


def split_columns(columns: int) -> int:
    """Columns of the vocabulary that one program walks. Depends on nothing else: a row's sums must not either."""
    share = max(1, -(-columns // SPLITS))
    return min(SPLIT_COLUMNS, -(-share // SPLIT_MULTIPLE) * SPLIT_MULTIPLE)


@dataclass(frozen=True)
class Blocks:
    """How the backward cuts its work so that it stays within WORKSPACE_BYTES."""

    columns: int  # of the vocabulary, for the heads' gradients
    rows: int  # for the hidden states' gradients
    tile_columns: int  # beside them

    @staticmethod
    def of(problem: Problem) -> Blocks:
        rows, real = max(1, problem.rows), max(1, problem.real_rows)
        widths = [states.shape[1] for states in problem.hidden]
        size, wide = problem.hidden[0].element_size(), problem.accumulate_dtype.itemsize
        column = rows * size + (max(widths) * wide if _rescaled(problem) else 0)  # dz and a product to be rescaled
        tile_columns = min(real, TILE_COLUMNS)
        row = (sum(widths) + max(widths)) * wide + tile_columns * size  # sums, what un-scaling holds at once, dz
        return Blocks(_whole(WORKSPACE_BYTES // column, real), _whole(WORKSPACE_BYTES // row, rows), tile_columns)


def _whole(fitting: int, needed: int) -> int:
    return min(needed, max(1, fitting // MULTIPLE * MULTIPLE or fitting))


def _rescaled(problem: Problem) -> bool:
    """fp16 holds neither small probabilities nor large upstream factors: dz is kept near 1 and scaled back."""
    return problem.hidden[0].dtype == torch.float16


@dataclass(frozen=True)
class Dlogits:
    """dz of any rows and columns of a problem, recomputed; exactly 0 in ignored rows."""

    problem: Problem
    gate_weights: Tensor  # (N, n)
    row_max: Tensor  # (N,)
    coefficients: tuple[Tensor, Tensor, Tensor]  # each (N,)

    def write(self, rows: slice, block: slice, out: Tensor) -> None:
        """dz of ``rows`` and the local columns ``block`` into out, of just that shape."""
        problem = self.problem
        part = replace(
            problem,
            hidden=tuple(states[rows] for states in problem.hidden),
            gate_logits=problem.gate_logits[rows],
            target=problem.target[rows],
        )
        _fill_dlogits(
            part.hidden,
            part.heads,
            self.gate_weights[rows],
            part.local_target(),
            self.row_max[rows],
            *(coefficient[rows] for coefficient in self.coefficients),
            out,
            block.start,
            block.stop,
        )


@launch_operator(
    "streaming_dlogits(Tensor[] hidden, Tensor[] heads, Tensor gate_weights, Tensor target, Tensor row_max,"
    " Tensor a, Tensor b, Tensor c, Tensor(a!) out, int start, int stop)"
)
def _fill_dlogits(
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    gate_weights: Tensor,
    target: Tensor,
    row_max: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    start: int,
    stop: int,
) -> None:
    rows, columns = out.shape

    def programs(tile: Tile) -> int:
        return int(triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n))

    def rest(tile: Tile) -> tuple[Any, ...]:
        tiny = has_tiny(gate_weights, tile.block_m)
        return gate_weights, target, tiny, row_max, a, b, c, out, rows, start, stop, out.stride(0)

    launch("dlogits", dlogits_kernel, programs, hidden, heads, rest)


class _StreamingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Any, grad_enabled: bool, target: Tensor, gate_logits: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
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
    def backward(ctx: Any, upstream: Tensor | None, _row_losses: None) -> tuple[Tensor | None, ...]:
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
    gate_weights = gate_softmax(problem)
    scale, factor = 1.0, None
    if _rescaled(problem) and problem.rows:
        scale, factor = FP16_SCALE, weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        weight = weight / factor
    coefficients = dlogit_coefficients(rows, weight * scale, problem.settings)
    dlogits = Dlogits(problem, gate_weights, rows[:, MAX].contiguous(), coefficients)
    gate = torch.empty_like(gate_weights) if needs.gate else None
    hidden = [
        torch.empty_like(states, memory_format=torch.contiguous_format) if need else None
        for states, need in zip(problem.hidden, needs.hidden, strict=True)
    ]
    heads = [
        torch.zeros_like(head, memory_format=torch.contiguous_format) if need else None
        for head, need in zip(problem.heads, needs.heads, strict=True)
    ]
    if problem.rows:
        if any(needs.heads):
            _write_heads(dlogits, heads, hidden, scale, factor)
        if needs.gate or any(needs.hidden):
            _write_hidden(dlogits, hidden, gate, scale, factor)
        if gate is not None and problem.settings.group is not None:
            dist.all_reduce(gate, group=problem.settings.group)
    return [gate, *hidden, *heads]


def _write_heads(
    dlogits: Dlogits,
    heads: list[Tensor | None],  # n x (V_local, d_j) out
    hidden: list[Tensor | None],  # n x (N, d_j): free memory, left full of x_j
    scale: float,
    factor: Tensor | None,
) -> None:
    problem, kept = dlogits.problem, dlogits.problem.kept()
    inputs = []  # n x (N, d_j): x_j = w_j h_j
    for j, (states, space) in enumerate(zip(problem.hidden, hidden, strict=True)):
        x = space
        if heads[j] is not None:
            x = torch.empty_like(states, memory_format=torch.contiguous_format) if space is None else space
            torch.mul(states, dlogits.gate_weights[:, j, None], out=x).masked_fill_(~kept[:, None], 0.0)
        inputs.append(x)
    columns = Blocks.of(problem).columns
    workspace = problem.hidden[0].new_empty((problem.rows, columns))
    products = None  # to be rescaled before they are rounded
    if factor is not None:
        products = factor.new_empty((columns, max(states.shape[1] for states in problem.hidden)))
    for block in _slices(problem.real_rows, columns):
        size = block.stop - block.start
        dlogits.write(slice(0, problem.rows), block, workspace[:, :size])
        for total, x in zip(heads, inputs, strict=True):
            if total is None or x is None:
                continue
            part = total[block] if products is None else products[:size, : x.shape[1]]
            gemm.accumulate(part, workspace[:, :size].t(), x, add=False, alpha=1.0 / scale)
            if factor is not None:
                torch.mul(part, factor, out=total[block])


def _write_hidden(
    dlogits: Dlogits,
    hidden: list[Tensor | None],  # n x (N, d_j) out
    gate: Tensor | None,  # (N, n) out
    scale: float,
    factor: Tensor | None,
) -> None:
    problem, kept = dlogits.problem, dlogits.problem.kept()
    blocks = Blocks.of(problem)
    workspace = problem.hidden[0].new_empty((blocks.rows, blocks.tile_columns))
    sums = [  # n x (rows, d_j): dx_j
        dlogits.gate_weights.new_empty((blocks.rows, states.shape[1])) if out is not None or gate is not None else None
        for states, out in zip(problem.hidden, hidden, strict=True)
    ]
    for rows in _slices(problem.rows, blocks.rows):
        count = rows.stop - rows.start
        d_inputs = [None if dx is None else dx[:count].zero_() for dx in sums]
        for block in _slices(problem.real_rows, blocks.tile_columns):
            dz = workspace[:count, : block.stop - block.start]
            dlogits.write(rows, block, dz)
            for dx, head in zip(d_inputs, problem.heads, strict=True):
                if dx is not None:
                    gemm.accumulate(dx, dz, head[block], add=True, alpha=1.0 / scale)
        for dx in d_inputs:
            if dx is not None and factor is not None:
                dx.mul_(factor)
        gate_scale.unscale_gradients(
            dlogits.gate_weights[rows],
            kept[rows],
            [states[rows] for states in problem.hidden],
            d_inputs,
            [None if out is None else out[rows] for out in hidden],
            None if gate is None else gate[rows],
        )


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
