"""The public loss: cross-entropy of a gated mixture of n heads, without ever holding n logit tensors.

For one response token, specialist j gives its last hidden state h_j; the gate weighs the specialists by
w = softmax(a_1 .. a_n) and the fused logits are z = sum_j w_j W_j h_j (paper, equation 1). The loss is the
cross-entropy of z against the token (equation 2), optionally with label smoothing and z-loss.

Backends: ``reference`` (plain PyTorch, the definition), ``chunked`` (row chunks, gradients formed in the forward) and
``gate_only`` (one pass, for frozen hidden states and heads), ``streaming`` (GPU: no logits in memory at all).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.ops import automatic, chunked, reference, registered
from ultrafuser_mega.ops.problem import Problem, check_main_grad, checked_problem, trainable
from ultrafuser_mega.ops.workspace import Workspace

P = ParamSpec("P")

BACKENDS = ("auto", "reference", "chunked", "gate_only", "streaming")


class LossWithRows(NamedTuple):
    loss: Tensor  # () or (N,) for reduction="none"; differentiable
    row_losses: Tensor  # (N,) fp32 (fp64 for fp64 inputs), without gradient; 0 on ignored rows


def mixture_cross_entropy_with_rows(
    hidden: Sequence[Tensor],  # n x (N, d_j)
    head_weight: Sequence[Tensor],  # n x (V_local, d_j)
    gate_logits: Tensor,  # (N, n)
    target: Tensor,  # (N,)
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str = "auto",
    head_main_grad: Sequence[Tensor | None] | None = None,  # n x (V_local, d_j)
    workspace: Workspace | None = None,
) -> LossWithRows:
    """Cross-entropy of z = sum_j softmax(gate_logits)_j W_j h_j against ``target``.

    Per kept row, with lse = log sum_v exp(z_v) and the mean over the ``vocab_size`` real rows of the vocabulary:
        (1 - label_smoothing) (lse - z_y) + label_smoothing (lse - mean_v z_v) + z_loss lse^2

    Args:
        hidden: n tensors (N, d_j), all bf16, fp16, fp32 or fp64; the widths d_j may differ.
        head_weight: n tensors (V_local, d_j) of the same type: rows vocab_start .. vocab_start + V_local of each head.
        gate_logits: (N, n), before the softmax; fp32 (fp64 when everything else is).
        target: (N,) int64, GLOBAL vocabulary ids. Rows that hold ``ignore_index`` count nothing and receive gradients
            of exactly zero, whatever their hidden states hold.
        group: the ranks the vocabulary is sharded over; None for one rank that holds it all.
        vocab_start: first vocabulary id of this rank's rows. Shards may be uneven and may be empty.
        vocab_size: real rows of the whole vocabulary; head rows beyond it are padding: masked, with zero gradient.
            Default: all rows given; required under a group.
        reduction: "mean" over the kept rows (0 if there are none), "sum", or "none" for a loss per row.
        label_smoothing: in [0, 1], over the GLOBAL vocabulary.
        z_loss: weight of lse^2, >= 0.
        backend: "auto", "reference", "chunked", "gate_only" or "streaming". auto takes gate_only where hidden and heads
            are frozen and the gate is not, chunked elsewhere; streaming where there is no group and a GPU has less
            memory free than what these hold at once.
        head_main_grad: one fp32 (fp64 for fp64 inputs) buffer per head, or None for a head without one, that receives
            += dW_j in the backward, unrounded (Megatron's weight.main_grad). Such a head's .grad stays as it is, and
            autograd's hooks on it do not run. Buffers of heads that require no gradient are not touched. Backend
            chunked alone, and not inside torch.compile. reduction="none" adds from within its matrix products and needs
            no memory for it (but with fp16), at its 4 GEMM passes; "sum" and "mean" keep the 3 and, unless one chunk
            takes all rows, hold one fp32 copy of dW_j between forward and backward.
        workspace: kept by the caller between calls on a CPU, where backend chunked takes the logits' memory from it.
            Not used inside torch.compile.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), () or (N,) for reduction="none", and every row's loss, detached, at no
        extra cost. This is what a trainer wants: the scalar of "sum" or "mean" takes 3 GEMM passes where "none" with
        trainable heads takes 4, and the rows are there for logging. :func:`mixture_cross_entropy` is the loss alone.

    Gradients are computed for the arguments that require them and only for those.

    UNDER A GROUP, hidden, gate_logits and target are replicated and every rank calls this with the same settings and
    the same pattern of requires_grad. The loss is the same on every rank, and so must be its upstream gradient. Then
        gate_logits.grad   is complete: already summed over the group, the same on every rank;
        head_weight.grad   belongs to this rank's rows;
        hidden.grad        IS ONLY THIS SHARD'S PART, accumulated in fp32 and rounded once to the type of ``hidden``:
                           the caller sums the parts, and may do so towards the owner of the hidden state alone.

    Raises:
        InputError: shapes, types, devices or settings that do not fit. On the CPU also a target outside the vocabulary
            (but not inside torch.compile) and shards whose sizes do not add up to ``vocab_size``, on every rank. On a
            GPU looking would stall the device: such a target's loss is inf, and such shards are not noticed.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: {backend!r} is none of {', '.join(BACKENDS)}")
    problem = checked_problem(
        hidden,
        head_weight,
        gate_logits,
        target,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    if backend == "auto":
        backend = automatic.backend_for(problem, can_stream=head_main_grad is None)
    if head_main_grad is not None:
        check_main_grad(head_main_grad, problem)
        if backend in ("reference", "streaming"):
            raise InputError(f"head_main_grad: backend {backend} cannot add to buffers; use chunked")
        if torch.compiler.is_compiling():
            raise InputError(
                "head_main_grad: buffers cannot be added to inside torch.compile; call the loss outside it"
            )
    if backend == "gate_only" and (name := trainable(problem)):
        raise InputError(f"backend: gate_only gives no gradient for {name}, which requires one; use chunked")
    if backend == "streaming" and (target.device.type != "cuda" or hidden[0].dtype == torch.float64):
        found = f"{hidden[0].dtype} on {target.device.type}"
        raise InputError(f"backend: streaming runs bf16, fp16 and fp32 on a GPU, not {found}; use chunked")
    with torch.autocast(target.device.type, enabled=False):  # the types are chosen here
        if backend == "reference":
            return _reference_loss(problem)
        if torch.compiler.is_compiling():
            return LossWithRows(*registered.mixture_loss(problem, backend))
        if backend == "chunked":
            given = head_main_grad or ()
            return LossWithRows(*chunked.mixture_loss(problem, head_main_grad=given, workspace=workspace))
        return LossWithRows(*registered.backend_loss(problem, backend))


def _loss_alone(with_rows: Callable[P, LossWithRows]) -> Callable[P, Tensor]:
    @functools.wraps(with_rows)
    def loss_alone(*args: P.args, **options: P.kwargs) -> Tensor:
        return with_rows(*args, **options).loss

    loss_alone.__name__ = loss_alone.__qualname__ = "mixture_cross_entropy"
    signature = inspect.signature(with_rows).replace(return_annotation="Tensor")
    vars(loss_alone)["__signature__"] = signature  # what help() shows
    return loss_alone


#: :func:`mixture_cross_entropy_with_rows` without the rows: the loss alone, from the same arguments.
mixture_cross_entropy = _loss_alone(mixture_cross_entropy_with_rows)


def _reference_loss(problem: Problem) -> LossWithRows:
    rows = reference.row_losses(problem)
    detached = rows.detach()
    match problem.settings.reduction:
        case "none":
            return LossWithRows(rows, detached.clone())
        case "sum":
            return LossWithRows(rows.sum(), detached)
        case _:
            return LossWithRows(rows.sum() / problem.kept().sum().clamp(min=1), detached)
