"""Distillation from a gated mixture of n heads into one: Kullback-Leibler divergence without anyone's full logits.

The teacher is the fused model of loss.py, frozen: its logits for a response token are z = sum_j w_j W_j h_j with
w = softmax(a_1 .. a_n) (paper, equation 1: the logits are mixed, not the probabilities). The student is one hidden
state and one head, s = W h. With p = softmax(z / T), q = softmax(s / T) and the label y, the loss of a row is

    (1 - labels) T^2 ((1 - reverse) KL(p | q) + reverse KL(q | p)) + labels CE(softmax(s), y)

The factor T^2 keeps the gradient's size where T changes (Hinton et al. 2015, section 2). Forward KL is what they
minimise; reverse KL on the student's own tokens is on-policy distillation (Agarwal et al. 2024, GKD).

In row chunks, as chunked.py: per chunk of C rows
    z = sum_j x_j W_j^T and s = h W^T     n + 1 GEMMs into two fp32 buffers (C, R)
    row statistics                        epilogue, one sweep of both; under a group one collective of 36 bytes per row
    ds over s                             epilogue, in place
    dh += ds W,  dW += ds^T h
so gradients are formed in the forward, in one GEMM pass over the teacher and three over the student. On a CPU all of it
goes block by block of the vocabulary, before and behind the statistics of the whole row, as in chunked.py. dW is summed
over chunks in the wide type. The upstream gradient, one scalar, is multiplied in the backward. Under a group a chunk's
collective travels while the next one's GEMMs run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import gate_scale, gemm
from ultrafuser_mega.ops.chunk import buffer_numbers, cut_out
from ultrafuser_mega.ops.chunked import FP16_SCALE, held_dtype, scaled
from ultrafuser_mega.ops.distillation_epilogue import Epilogue, epilogue_for
from ultrafuser_mega.ops.distillation_statistics import COLUMNS, Mix, PendingStatistics, combine, row_losses
from ultrafuser_mega.ops.forward import BUFFER_BYTES, block_columns, column_blocks, cut, local_columns
from ultrafuser_mega.ops.problem import Problem, checked_problem
from ultrafuser_mega.ops.workspace import Workspace

#: In flight by default. On a CPU as many rows go at once as of the mixture's logits alone: half as many make the loss
#: slower.
LESSON_BYTES = BUFFER_BYTES | {"cpu": 2 * BUFFER_BYTES["cpu"]}


class DistillationLoss(NamedTuple):
    loss: Tensor  # (); differentiable in the student's hidden states and head
    row_losses: Tensor  # (N,) fp32 (fp64 for fp64 inputs), without gradient, as all that follows; 0 on ignored rows
    divergence: Tensor  # (N,) (1 - reverse) KL(p | q) + reverse KL(q | p) alone, without T^2
    cross_entropy: Tensor  # (N,) of the student at temperature 1 against the labels


def distillation_loss(
    hidden: Tensor,  # (N, d)
    head_weight: Tensor,  # (V_local, d)
    teacher_hidden: Sequence[Tensor],  # n x (N, d_j)
    teacher_head_weight: Sequence[Tensor],  # n x (V_local, d_j)
    gate_logits: Tensor,  # (N, n)
    target: Tensor,  # (N,)
    *,
    temperature: float = 1.0,
    reverse: float = 0.0,
    labels: float = 0.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    buffer_bytes: int | None = None,
    epilogue: Epilogue | None = None,
    workspace: Workspace | None = None,
) -> DistillationLoss:
    """The student (``hidden``, ``head_weight``) learns the mixture's distribution over every token, as above.

    Args:
        hidden: (N, d) of the student, bf16, fp16, fp32 or fp64.
        head_weight: (V_local, d) of the student, of the same type: rows vocab_start .. vocab_start + V_local.
        teacher_hidden, teacher_head_weight, gate_logits: of the teacher, in the types of
            :func:`~ultrafuser_mega.ops.loss.mixture_cross_entropy`; nothing of it may require a gradient. A gate of 0
            and -inf chooses a teacher per row.
        target: (N,) int64, GLOBAL vocabulary ids. Rows that hold ``ignore_index`` count nothing and receive gradients
            of exactly zero, whatever the hidden states hold.
        temperature: T > 0, of both.
        reverse: in [0, 1], the share of KL(q | p).
        labels: in [0, 1], the share of the labels' cross-entropy.
        group, vocab_start, vocab_size: the vocabulary's shards, as there. Then ``hidden.grad`` IS ONLY THIS SHARD'S
            PART, and the loss is the same on every rank.
        reduction: "mean" over the kept rows (0 if there are none) or "sum".
        buffer_bytes: bound on what grows with a chunk; the default suits the device.
        epilogue: what works between the GEMMs; the default suits the device.
        workspace: kept by the caller between calls on a CPU, where the logits take their memory from it.

    A logit of -inf is a word that cannot come: of the teacher it counts nothing in KL(p | q); where only one of the two
    rules a word out the divergence is of the order of 1e30 instead of infinite, and its gradient finite.

    Raises:
        InputError: shapes, types, devices or settings that do not fit, or a teacher that requires a gradient.
    """
    for name, tensor in (("hidden", hidden), ("head_weight", head_weight)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name}: a {type(tensor).__name__}, needed a tensor")
    teacher = checked_problem(
        teacher_hidden,
        teacher_head_weight,
        gate_logits,
        target,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=0.0,
        z_loss=0.0,
    )
    if reduction == "none":
        raise InputError("reduction: 'none' is none of mean, sum; row_losses has every row's loss")
    _check_student(hidden, head_weight, teacher)
    _check_frozen(teacher)
    mix = Mix(
        _share("temperature", temperature, top=float("inf")), _share("reverse", reverse), _share("labels", labels)
    )
    if mix.temperature == 0:
        raise InputError("temperature: 0 must be above 0")
    plan = _Plan(teacher, mix, hidden, buffer_bytes, epilogue, workspace)
    with torch.autocast(target.device.type, enabled=False):
        loss, rows = _Distillation.apply(plan, hidden, head_weight)
    return DistillationLoss(loss, *rows.unbind())


def _check_student(hidden: Tensor, head: Tensor, teacher: Problem) -> None:
    held = teacher.heads[0].shape[0]
    if hidden.dim() != 2 or hidden.shape[0] != teacher.rows:
        raise InputError(f"hidden: shape {tuple(hidden.shape)}, needed ({teacher.rows}, d): a row for every target")
    if head.dim() != 2 or head.shape != (held, hidden.shape[1]):
        raise InputError(
            f"head_weight: shape {tuple(head.shape)}, needed ({held}, {hidden.shape[1]}): the rows of"
            " teacher_head_weight[0] by the width of hidden"
        )
    first = teacher.hidden[0]
    for name, tensor in (("hidden", hidden), ("head_weight", head)):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise InputError(
                f"{name}: {tensor.dtype} on {tensor.device}, needed {first.dtype} on {first.device},"
                " as teacher_hidden[0]"
            )


def _check_frozen(teacher: Problem) -> None:
    if not torch.is_grad_enabled():
        return
    named = {f"teacher_hidden[{j}]": states for j, states in enumerate(teacher.hidden)}
    named |= {f"teacher_head_weight[{j}]": head for j, head in enumerate(teacher.heads)}
    for name, tensor in (named | {"gate_logits": teacher.gate_logits}).items():
        if tensor.requires_grad:
            raise InputError(f"{name}: requires a gradient, but the teacher is frozen; pass it detached")


def _share(name: str, value: object, top: float = 1.0) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name}: {value!r}, needed a number")
    number = float(value)
    if not 0.0 <= number <= top or number == float("inf"):
        raise InputError(f"{name}: {value} lies outside {'[0, 1]' if top == 1.0 else 'the positive numbers'}")
    return number


class _Plan:
    """How a problem is cut into chunks, together with what its autograd node carries besides the student's tensors."""

    def __init__(
        self,
        teacher: Problem,
        mix: Mix,
        hidden: Tensor,
        buffer_bytes: int | None,
        epilogue: Epilogue | None,
        workspace: Workspace | None,
    ) -> None:
        self.teacher, self.mix, self.workspace = teacher, mix, workspace or Workspace()
        self.grad_enabled = torch.is_grad_enabled()
        self.epilogue = epilogue or epilogue_for(hidden.device, hidden.dtype)
        width = hidden.shape[1] + sum(states.shape[1] for states in teacher.hidden)
        settings, wide = teacher.settings, teacher.accumulate_dtype.itemsize
        operand = self.epilogue.operand_dtype.itemsize
        self.buffers, self.chunk_rows, self.row_bytes = cut(
            teacher.rows,
            2 * settings.vocab_size,  # both models'
            settings.shards,
            width,
            operand,
            wide,
            buffer_bytes or LESSON_BYTES.get(hidden.device.type, LESSON_BYTES["cpu"]),
        )
        most = block_columns(teacher.real_rows, hidden.device, operand, wide)
        self.blocks = column_blocks(teacher.real_rows, most)


@dataclass(frozen=True)
class _Chunk:
    """A chunk between its two halves: its logits are computed, its statistics are on their way to all ranks."""

    rows: slice
    logits: list[tuple[Tensor, Tensor]]  # of every block (C, B) in a buffer: the teacher's, the student's
    inputs: Tensor  # (C, d): the student's hidden states in the GEMMs' type, 0 on ignored rows
    pending: PendingStatistics


class _Sweep:
    """One pass over all chunks. After run(): statistics (N, 8) of the whole vocabulary; hidden (N, d), this shard's
    part, and head (V_local, d) in the wide type, None where not needed."""

    def __init__(self, plan: _Plan, hidden: Tensor, head: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> None:
        teacher = plan.teacher
        self.plan, self.teacher, self.states, self.weight = plan, teacher, hidden, weight
        self.kept, self.student_head = teacher.kept(), head
        self.targets = local_columns(teacher.local_target(), len(plan.blocks), plan.blocks[0].stop)  # (blocks, N)
        self.scale = FP16_SCALE if plan.epilogue.operand_dtype == torch.float16 else 1.0
        self.statistics = weight.new_empty((teacher.rows, COLUMNS))
        self.hidden = torch.empty(hidden.shape, dtype=held_dtype(hidden.dtype), device=hidden.device)
        self.head = weight.new_empty(head.shape) if needs[1] else None
        if self.head is not None:
            self.head[teacher.real_rows if teacher.rows else 0 :].zero_()  # what no product writes
        self.needs = needs

    def run(self) -> None:
        plan, rows = self.plan, self.teacher.rows
        numbers = buffer_numbers(plan.chunk_rows, plan.blocks, self.weight.device)
        memory = plan.workspace.take(plan.buffers * 2 * numbers, self.weight.dtype, self.weight.device)
        buffers = memory.view(plan.buffers, 2, numbers)
        self.d_inputs = self.weight.new_empty((plan.chunk_rows, self.states.shape[1])) if self.needs[0] else None
        started: deque[_Chunk] = deque()
        for index, start in enumerate(range(0, rows, plan.chunk_rows)):
            chunk = slice(start, min(start + plan.chunk_rows, rows))
            started.append(self._begun(chunk, buffers[index % plan.buffers]))
            while len(started) >= plan.buffers:
                self._finish(started.popleft())
        while started:
            self._finish(started.popleft())
        plan.workspace.give(memory)

    def _begun(self, rows: slice, buffer: Tensor) -> _Chunk:
        teacher, dtype = self.teacher, self.plan.epilogue.operand_dtype
        kept = self.kept[rows]
        _, inputs = gate_scale.scale_inputs(
            teacher.gate_logits[rows], kept, [states[rows] for states in teacher.hidden], dtype
        )
        _, (own,) = gate_scale.scale_inputs(self.weight.new_zeros((kept.shape[0], 1)), kept, [self.states[rows]], dtype)
        mix, blocks = self.plan.mix, self.plan.blocks
        count = rows.stop - rows.start
        known, learnt = (cut_out(plane, count, blocks) for plane in buffer)
        logits, found = list(zip(known, learnt, strict=True)), []
        for block, (z, s), target in zip(blocks, logits, self.targets, strict=True):
            for j, (x, head) in enumerate(zip(inputs, teacher.heads, strict=True)):
                gemm.accumulate(z, x, head[block].t(), add=j > 0)
            gemm.accumulate(s, own, self.student_head[block].t(), add=False)
            found.append(self.plan.epilogue.statistics(z, s, target[rows], mix))
        local = found[0] if len(found) == 1 else combine(torch.stack(found), mix.temperature)
        return _Chunk(rows, logits, own, PendingStatistics(local, teacher.real_rows, teacher.settings, mix.temperature))

    def _finish(self, chunk: _Chunk) -> None:
        rows = chunk.rows
        statistics = self.statistics[rows] = chunk.pending.wait()
        if not any(self.needs):
            return
        weight = self.weight[rows] * self.scale
        dx = None if self.d_inputs is None else self.d_inputs[: rows.stop - rows.start]
        for i, (block, (z, s), target) in enumerate(zip(self.plan.blocks, chunk.logits, self.targets, strict=True)):
            ds = self.plan.epilogue.dlogits(z, s, target[rows], statistics, weight, self.plan.mix)
            if self.head is not None:
                out = self.head[block]
                gemm.accumulate(out, ds.t(), chunk.inputs, add=rows.start > 0, alpha=1.0 / self.scale)
            if dx is not None:
                gemm.accumulate(dx, ds, self.student_head[block], add=i > 0, alpha=1.0 / self.scale)
        if dx is not None:
            self.hidden[rows] = dx


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        kept = plan.teacher.kept()
        weight = kept.to(plan.teacher.accumulate_dtype)
        share = weight.sum().clamp(min=1.0).reciprocal() if plan.teacher.settings.reduction == "mean" else None  # ()
        # fp16 has no room for probabilities divided by the number of rows: there the backward multiplies by the share
        late = share if share is not None and hidden.dtype == torch.float16 else None
        needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2]) if plan.grad_enabled else (False, False)
        sweep = _Sweep(plan, hidden, head, weight if share is None or late is not None else weight * share, needs)
        sweep.run()
        rows = row_losses(sweep.statistics, kept, plan.mix)
        loss = rows[0].sum() if share is None else rows[0].sum() * share
        ctx.dtypes = (hidden.dtype, head.dtype)
        ctx.save_for_backward(late, sweep.hidden if needs[0] else None, sweep.head)
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return loss, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _rows: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None
        late, *gradients = ctx.saved_tensors
        factor = upstream if late is None else upstream * late
        reuse = not torch._C._autograd._get_current_graph_task_keep_graph()  # with retain_graph they serve again
        return None, *(
            None if gradient is None else scaled(gradient, factor, dtype, reuse)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
