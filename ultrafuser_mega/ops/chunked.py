"""The mixture cross-entropy in row chunks: vendor GEMMs, one reused logit buffer, gradients formed in the forward.

Per chunk of C rows, with x_j = w_j h_j and all n heads read in place:
    w, x_j                         gate_scale.py
    z = sum_j x_j W_j^T            n GEMMs into one fp32 buffer (C, R): the segments are added unrounded
    row statistics                 epilogue.py, in one sweep; under a group one collective of 20 bytes per row
    dz over z                      epilogue.py, in place
    dx_j += dz W_j
    dW_j += dz^T x_j
    dh_j, da_j from dx_j           gate_scale.py, in one pass
which is 3 GEMM passes where forward-then-backward needs 4 without keeping the logits. Only what requires a gradient
is computed: 2 passes with frozen heads, 1 under no_grad (forward.py).

On a CPU both halves, before and behind the statistics of the whole row, go block by block of the vocabulary, so that
what one step writes is in the cache when the next one reads it.

dW_j sums over all rows. The first of several chunks finds its memory empty, the others add, in fp32. For bf16 heads
that sum would be a second copy twice as large as the gradients, so there dz of all rows is kept in the gradients' own
memory until one product over all rows can be taken (parked_dlogits.py), as long as there are no more rows than hidden
units: N <= sum d_j.

Where all rows fit and a shard has few words for its hidden units, planes.py takes over, which scales nothing. Else,
where one chunk takes all rows, it waits for the backward between its statistics and dz, with its logits and x_j:
nothing is computed twice, and every factor that comes from upstream is in dz before any product.

Elsewhere the upstream gradient is not known when gradients are formed. It is one scalar for "sum" and "mean", and one
factor per row of dh and da for "none", so it is applied in the backward. Only dW under "none" mixes rows: in that case
the forward computes the row losses alone and the backward runs the whole sweep with the upstream factors as row weights
(4 passes in all).
The sweep takes its statistics from its own z. The forward's were taken of other blocks of columns, and a BLAS gives a
logit other bits in a product of another shape: a last bit of a logit of 1e6 is 6 % of a probability, so that under the
forward's sum of exponentials a row of dz would no longer add up.

A head may have a buffer in which a trainer collects its gradient in the wide type over several calls (Megatron's
weight.main_grad). Its dW is added there, in the backward, and never rounded: with "none" or one chunk by the sweep's
GEMMs themselves, without further memory; else from the forward's sums, times the upstream gradient (with fp16 always).

Under a group two buffers alternate, so that a chunk's collective travels while the next chunk's GEMM runs; where all
rows fit into one, there is one, and no next chunk. Chunk sizes derive from numbers every rank shares, since each chunk
is a collective.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.ops import gate_scale, gemm, parked_dlogits, planes
from ultrafuser_mega.ops.chunk import Chunk, begin_chunk, buffer_numbers
from ultrafuser_mega.ops.epilogue import Epilogue, epilogue_for
from ultrafuser_mega.ops.forward import (
    block_columns,
    buffer_budget,
    column_blocks,
    cut,
    forward_statistics,
    local_columns,
)
from ultrafuser_mega.ops.parked_dlogits import ParkedDlogits
from ultrafuser_mega.ops.problem import Needs, Problem, readable
from ultrafuser_mega.ops.statistics import COLUMNS, MAX, dlogit_coefficients, row_loss
from ultrafuser_mega.ops.workspace import Workspace

FP16_SCALE = 256.0  # fp16 probabilities below 6e-5 would be subnormal: dz is stored scaled, its GEMMs scale back


def mixture_loss(
    problem: Problem,
    *,
    head_main_grad: Sequence[Tensor | None] = (),
    buffer_bytes: int | None = None,
    epilogue: Epilogue | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient).

    ``head_main_grad``: n x (V_local, d_j) or None, what receives += dW_j in place of the heads' .grad; () for none.

    ``workspace``: where logits get their memory from.

    ``buffer_bytes`` bounds what grows with a chunk (logits, x_j, dx_j), all together; the default suits the device.
    """
    plan, needs = Plan(problem, buffer_bytes, epilogue, head_main_grad, workspace), Needs.of(problem)
    if needs.any and planes.serve(problem, plan.epilogue, plan.buffer_bytes):
        return planes.mixture_loss(problem, needs, plan.epilogue, head_main_grad)
    return _ChunkedLoss.apply(plan, problem.target, problem.gate_logits, *problem.hidden, *problem.heads)


class Plan:
    """How a problem is cut into chunks, together with what its autograd node carries besides tensors."""

    def __init__(
        self,
        problem: Problem,
        buffer_bytes: int | None = None,
        epilogue: Epilogue | None = None,
        head_main_grad: Sequence[Tensor | None] = (),
        workspace: Workspace | None = None,
    ) -> None:
        hidden = problem.hidden[0]
        self.workspace = workspace or Workspace()
        self.main_grad = tuple(head_main_grad) or (None,) * len(problem.heads)
        self.settings = problem.settings
        self.grad_enabled = torch.is_grad_enabled()
        self.epilogue = epilogue or epilogue_for(hidden.device, hidden.dtype)
        self.buffer_bytes = buffer_bytes or buffer_budget(hidden.device)
        width, wide = sum(states.shape[1] for states in problem.hidden), problem.accumulate_dtype.itemsize
        columns, operand = problem.settings.vocab_size, self.epilogue.operand_dtype.itemsize
        self.buffers, self.chunk_rows, self.row_bytes = cut(
            problem.rows, columns, problem.settings.shards, width, operand, wide, self.buffer_bytes
        )
        most = block_columns(problem.real_rows, hidden.device, operand, wide)  # what is parked (below) is cut otherwise
        self.blocks = column_blocks(problem.real_rows, most)

    def own_heads(self, needs: Needs) -> list[int]:
        """Those whose gradients are formed here rather than added to a buffer of the caller's."""
        return [j for j, main in enumerate(self.main_grad) if needs.heads[j] and main is None]

    def head_dtype(self, problem: Problem, needs: Needs) -> torch.dtype:
        """In which the heads' gradients are formed: one product may round, what chunks add up to may not."""
        operand = self.epilogue.operand_dtype
        fits = parked_dlogits.fits(problem.rows, [problem.heads[j].shape[1] for j in self.own_heads(needs)])
        if problem.rows and operand != torch.float16 and (self.chunk_rows >= problem.rows or fits):
            return operand
        return problem.accumulate_dtype

    def workspace_bytes(self, problem: Problem, needs: Needs) -> int:
        """The most memory beyond the gradients at once, short of what there is one number of per row."""
        if planes.serve(problem, self.epilogue, self.buffer_bytes):
            widths, wide = [states.shape[1] for states in problem.hidden], problem.accumulate_dtype
            return problem.rows * planes.row_bytes(
                problem.real_rows, widths, self.epilogue.operand_dtype.itemsize, wide.itemsize
            )
        chunk = self.chunk_rows * self.row_bytes
        own, wide = self.own_heads(needs), problem.accumulate_dtype
        if not own or problem.heads[0].dtype == wide:
            return chunk
        if self.head_dtype(problem, needs) == wide:  # sums, of which the gradients are made
            return chunk + sum(problem.heads[j].numel() for j in own) * wide.itemsize
        if self.chunk_rows >= problem.rows:
            return chunk
        inputs = sum(states.numel() for states in problem.hidden) * self.epilogue.operand_dtype.itemsize
        return max(chunk, inputs + parked_dlogits.WORKSPACE_BYTES)

    def buffer(self, problem: Problem) -> Tensor:
        """Memory for the logits of one chunk."""
        device, dtype = problem.gate_logits.device, problem.gate_logits.dtype
        return self.workspace.take(buffer_numbers(self.chunk_rows, self.blocks, device), dtype, device)

    def targets(self, problem: Problem) -> Tensor:
        """(blocks, N): each row's target as a column of each block, -1 where it lies in another."""
        return local_columns(problem.local_target(), len(self.blocks), self.blocks[0].stop)

    def chunks(self, rows: int) -> Iterator[slice]:
        for start in range(0, rows, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, rows))

    def problem(self, target: Tensor, gate_logits: Tensor, tensors: Sequence[Tensor]) -> Problem:
        n = len(tensors) // 2
        return Problem(tuple(tensors[:n]), tuple(tensors[n:]), gate_logits, target, self.settings)


class Sweep:
    """One pass over all chunks.

    ``into``: buffers that the heads' gradients are added to as they come, None for those that get a sum of their own.
    ``begun``: the chunk of all rows where its first half is done.

    After run(): statistics (N, 4) of the whole vocabulary; gate (N, n), summed over the group; hidden n x (N, d_j),
    this shard's part; heads n x (V_local, d_j). What is not needed is None.
    """

    def __init__(
        self,
        problem: Problem,
        plan: Plan,
        needs: Needs,
        weight: Tensor,  # (N,): 0 on ignored rows
        into: Sequence[Tensor | None] = (),
        begun: Chunk | None = None,
    ) -> None:
        self.problem, self.plan, self.needs, self.weight, self.begun = problem, plan, needs, weight, begun
        wide = problem.accumulate_dtype
        n, rows = len(problem.hidden), problem.rows
        self.targets = plan.targets(problem)
        self.kept = problem.kept()
        self.scale = FP16_SCALE if plan.epilogue.operand_dtype == torch.float16 else 1.0

        self.statistics = weight.new_empty((rows, COLUMNS))
        self.gate = weight.new_zeros((rows, n)) if needs.gate else None
        self.hidden = [
            torch.empty_like(states, dtype=held_dtype(states.dtype), memory_format=torch.contiguous_format)
            if need
            else None
            for states, need in zip(problem.hidden, needs.hidden, strict=True)
        ]
        self.into = tuple(into) or (None,) * n
        own, rounded = plan.own_heads(needs), plan.head_dtype(problem, needs)
        self.heads: list[Tensor | None] = [None] * n
        for j, head in enumerate(problem.heads):
            if needs.heads[j]:
                given = self.into[j]
                self.heads[j] = self._head_sum(head, rounded if j in own else wide) if given is None else given
        self.parked: ParkedDlogits | None = None
        self.parked_heads: list[int] = []
        if own and plan.chunk_rows < rows and rounded != wide and problem.real_rows:
            self.parked_heads = own
            self.parked = ParkedDlogits([self._real(j) for j in own], rows)

    def _head_sum(self, head: Tensor, dtype: torch.dtype) -> Tensor:
        if self.problem.rows == 0:
            return torch.zeros_like(head, dtype=dtype)
        total = torch.empty_like(head, dtype=dtype, memory_format=torch.contiguous_format)
        total[self.problem.real_rows :].zero_()  # padding
        return total

    def _real(self, j: int) -> Tensor:
        total = self.heads[j]
        assert total is not None
        return total[: self.problem.real_rows]

    def run(self) -> None:
        problem = self.problem
        self._all_chunks()
        if self.parked is not None:  # the chunks' buffers are free by now
            _, inputs = gate_scale.scale_inputs(
                problem.gate_logits, self.kept, problem.hidden, self.plan.epilogue.operand_dtype
            )
            self.parked.finish([inputs[j] for j in self.parked_heads])
        if self.gate is not None and problem.settings.group is not None and problem.rows:
            dist.all_reduce(self.gate, group=problem.settings.group)

    def _all_chunks(self) -> None:
        plan, problem = self.plan, self.problem
        d_inputs = [  # n x (chunk, d_j): dx_j, one buffer for all chunks
            self.weight.new_empty((plan.chunk_rows, states.shape[1])) if need or self.needs.gate else None
            for states, need in zip(problem.hidden, self.needs.hidden, strict=True)
        ]
        if self.begun is not None:
            self._finish(self.begun, d_inputs)
            plan.workspace.give(self.begun.buffer)
            return
        buffers = [plan.buffer(problem) for _ in range(plan.buffers)]
        started: deque[Chunk] = deque()
        for index, rows in enumerate(plan.chunks(problem.rows)):
            buffer = buffers[index % plan.buffers]
            started.append(begin_chunk(problem, plan.epilogue, plan.blocks, rows, buffer, self.kept, self.targets))
            while len(started) >= plan.buffers:
                self._finish(started.popleft(), d_inputs)
        while started:
            self._finish(started.popleft(), d_inputs)
        plan.workspace.give(buffers[0])

    def _finish(self, chunk: Chunk, buffers: list[Tensor | None]) -> None:
        rows = chunk.rows
        self.statistics[rows] = chunk.pending.wait()
        statistics = self.statistics[rows]
        coefficients = dlogit_coefficients(statistics, self.weight[rows] * self.scale, self.problem.settings)
        row_max, d_inputs = statistics[:, MAX], [None if dx is None else dx[: rows.stop - rows.start] for dx in buffers]
        for i, (block, target) in enumerate(zip(self.plan.blocks, self.targets, strict=True)):
            logits, scratch = chunk.logits[i], chunk.scratch[i]
            dz = self.plan.epilogue.dlogits(logits, scratch, target[rows], row_max, coefficients)
            if self.parked is not None:
                self.parked.park(rows, dz)
            for j, (head, total, dx) in enumerate(zip(self.problem.heads, self.heads, d_inputs, strict=True)):
                if total is not None and j not in self.parked_heads:
                    add = rows.start > 0 or self.into[j] is not None
                    gemm.accumulate(total[block], dz.t(), chunk.inputs[j], add=add, alpha=1.0 / self.scale)
                if dx is not None:
                    gemm.accumulate(dx, dz, head[block], add=i > 0, alpha=1.0 / self.scale)
        if any(dx is not None for dx in d_inputs):
            gate_scale.unscale_gradients(
                chunk.gate_weights,
                self.kept[rows],
                [states[rows] for states in self.problem.hidden],
                d_inputs,
                [None if out is None else out[rows] for out in self.hidden],
                None if self.gate is None else self.gate[rows],
            )


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a per-row gradient awaits its upstream factor: small ones would not survive the wait in fp16."""
    return torch.float32 if dtype == torch.float16 else dtype


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, target: Tensor, gate_logits: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        problem = plan.problem(target, gate_logits, tensors)
        n = len(problem.hidden)
        wanted = ctx.needs_input_grad[2:] if plan.grad_enabled else (False,) * (1 + 2 * n)
        needs = Needs(wanted[0], tuple(wanted[1 : 1 + n]), tuple(wanted[1 + n :]))
        kept = problem.kept()
        weight = kept.to(problem.accumulate_dtype)
        share = weight.sum().clamp(min=1.0).reciprocal() if plan.settings.reduction == "mean" else None  # ()
        # fp16 has no room for probabilities divided by the number of rows: there the backward multiplies by the share
        late_share = share if share is not None and problem.hidden[0].dtype == torch.float16 else None
        per_row = plan.settings.reduction == "none"
        ctx.plan, ctx.needs = plan, needs
        ctx.main_grad = (None,) * (1 + n) + plan.main_grad  # of gate logits, hidden, heads
        ctx.dtypes = [tensor.dtype for tensor in (gate_logits, *tensors)]
        ctx.begun = None
        single = 0 < problem.rows <= plan.chunk_rows
        ctx.deferred = needs.any and (single or (per_row and any(needs.heads)))

        if ctx.deferred and single:
            rows, buffer, targets = slice(0, problem.rows), plan.buffer(problem), plan.targets(problem)
            ctx.begun = begin_chunk(problem, plan.epilogue, plan.blocks, rows, buffer, kept, targets)
            statistics = ctx.begun.pending.wait()
            ctx.save_for_backward(target, gate_logits, *tensors)
        elif ctx.deferred or not needs.any:
            statistics = forward_statistics(problem, plan.epilogue, plan.buffer_bytes)
            ctx.save_for_backward(target, gate_logits, *tensors)
        else:
            sweep = Sweep(problem, plan, needs, weight if share is None or late_share is not None else weight * share)
            sweep.run()
            statistics = sweep.statistics
            ctx.save_for_backward(late_share, sweep.gate, *sweep.hidden, *sweep.heads)
        row_losses = row_loss(statistics, kept, plan.settings)
        loss = row_losses.clone() if per_row else row_losses.sum()
        if share is not None:
            loss = loss * share
        ctx.mark_non_differentiable(row_losses)
        ctx.set_materialize_grads(False)
        return loss, row_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _row_losses: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (2 + len(ctx.dtypes))
        if ctx.deferred:
            gradients, factor = _deferred_gradients(ctx, upstream)
            reuse = True
        else:
            late_share, *gradients = ctx.saved_tensors
            factor = upstream if late_share is None else upstream * late_share
            # with retain_graph the saved gradients serve again
            reuse = not torch._C._autograd._get_current_graph_task_keep_graph()
        returned = []
        for gradient, dtype, main in zip(gradients, ctx.dtypes, ctx.main_grad, strict=True):
            if gradient is None or main is None:
                returned.append(None if gradient is None else scaled(gradient, factor, dtype, reuse))
                continue
            if gradient is not main:  # the sweep has added the rest itself
                assert factor is not None  # (), since dW of "none" is the sweep's
                main.addcmul_(gradient, factor)
            returned.append(None)
        return None, None, *returned


def _deferred_gradients(ctx: Any, upstream: Tensor) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients that the backward forms, up to one common factor () if there is one: the rest of the chunk that is
    begun, or, with "none" and in a second backward of the same graph, a sweep of its own."""
    target, gate_logits, *tensors = ctx.saved_tensors
    problem = ctx.plan.problem(target, gate_logits, tensors)
    begun, ctx.begun = ctx.begun, None
    kept = problem.kept()
    weight = torch.where(kept, upstream, 0.0)
    if ctx.plan.settings.reduction == "mean":
        weight = weight / kept.sum().clamp(min=1)
    factor, into = None, ctx.plan.main_grad
    if problem.hidden[0].dtype == torch.float16 and problem.rows:  # a loss scale of 2^16 does not fit fp16
        factor = weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
        weight, into = weight / factor, ()
    sweep = Sweep(problem, ctx.plan, ctx.needs, weight, into, begun)
    sweep.run()
    return [sweep.gate, *sweep.hidden, *sweep.heads], factor


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype, reuse: bool) -> Tensor:
    """gradient (rows, columns) times factor, () or (rows,), in ``dtype``; within its own memory where it may be."""
    if factor is None or (factor.dim() == 0 and readable(factor) and factor.item() == 1.0):
        return gradient.to(dtype, copy=not reuse)
    # two dimensions keep the factor in fp32: PyTorch would round a 0-dimensional one to the gradient's 16 bits
    out = gradient if reuse and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.reshape(-1, 1), out=out)
