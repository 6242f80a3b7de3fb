"""The loss as registered PyTorch operators, so that torch.compile traces through a call without a graph break.

Inside a compiled graph the backends are opaque: one operator runs a backend's own autograd node and, where the upstream
gradient enters linearly row by row, takes its gradients for an upstream of ones at once; the traced backward scales
them. Two exceptions have a second operator as their backward, which runs the backend again: reduction="none" with
trainable heads (dW mixes rows), and fp16 gradients, which would not survive in fp16 until a loss scale is known.
Outside torch.compile these are not used: they cannot scale gradients in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.ops import chunked, gate_only
from ultrafuser_mega.ops.problem import Problem, Settings, accumulate_dtype


def mixture_loss(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(loss, row losses (N,) without gradient); backend: chunked, gate_only or streaming."""
    settings = problem.settings
    grad = torch.is_grad_enabled()
    inputs = (problem.gate_logits, *problem.hidden, *problem.heads)
    loss, row_losses, *_ = mixture_forward(
        problem.target,
        problem.gate_logits,
        list(problem.hidden),
        list(problem.heads),
        [grad and tensor.requires_grad for tensor in inputs],
        backend,
        "" if settings.group is None else settings.group.group_name,
        settings.vocab_start,
        settings.vocab_size,
        settings.ignore_index,
        settings.reduction,
        settings.label_smoothing,
        settings.z_loss,
    )
    return loss, row_losses.detach()


@torch.library.custom_op("ultrafuser::mixture_forward", mutates_args=())
def mixture_forward(
    target: Tensor,  # (N,)
    gate_logits: Tensor,  # (N, n)
    hidden: Sequence[Tensor],  # n x (N, d_j)
    heads: Sequence[Tensor],  # n x (V_local, d_j)
    needs: Sequence[bool],  # of gate_logits, hidden, heads
    backend: str,
    group: str,  # its name; "" for none
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> list[Tensor]:
    """[loss, row losses, gradients for an upstream of ones of what needs one (none of them if deferred)]."""
    settings = _settings(group, vocab_start, vocab_size, ignore_index, reduction, label_smoothing, z_loss)
    wanted = [False] * len(needs) if _deferred(reduction, needs, hidden[0].dtype) else needs
    loss, row_losses, leaves = _run(target, gate_logits, hidden, heads, wanted, backend, settings)
    gradients = torch.autograd.grad(loss, leaves, torch.ones_like(loss)) if leaves else ()
    return [loss.detach(), row_losses.clone(), *(gradient.contiguous() for gradient in gradients)]


@torch.library.custom_op("ultrafuser::mixture_backward", mutates_args=())
def mixture_backward(
    upstream: Tensor,  # () or (N,), as the loss
    target: Tensor,
    gate_logits: Tensor,
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
    group: str,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> list[Tensor]:
    """The gradients of what needs one, where the forward could not take them."""
    settings = _settings(group, vocab_start, vocab_size, ignore_index, reduction, label_smoothing, z_loss)
    loss, _, leaves = _run(target, gate_logits, hidden, heads, needs, backend, settings)
    return [gradient.contiguous() for gradient in torch.autograd.grad(loss, leaves, upstream)]


@mixture_forward.register_fake
def _(
    target: Tensor,
    gate_logits: Tensor,
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    needs: Sequence[bool],
    *rest: Any,
) -> list[Tensor]:
    reduction = rest[5]
    rows = gate_logits.new_empty(target.shape[0], dtype=accumulate_dtype(hidden[0].dtype))
    loss = torch.empty_like(rows) if reduction == "none" else rows.new_empty(())
    wanted = [False] * len(needs) if _deferred(reduction, needs, hidden[0].dtype) else needs
    return [loss, rows, *_fake_gradients((gate_logits, *hidden, *heads), wanted)]


@mixture_backward.register_fake
def _(
    upstream: Tensor,
    target: Tensor,
    gate_logits: Tensor,
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    needs: Sequence[bool],
    *_: Any,
) -> list[Tensor]:
    return _fake_gradients((gate_logits, *hidden, *heads), needs)


def _fake_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    target, gate_logits, hidden, heads, needs, *rest = inputs
    ctx.needs, ctx.rest, ctx.n = needs, rest, len(hidden)
    ctx.deferred = _deferred(rest[5], needs, hidden[0].dtype)
    ctx.save_for_backward(*((target, gate_logits, *hidden, *heads) if ctx.deferred else output[2:]))
    ctx.set_materialize_grads(False)


@torch.no_grad()  # gradients have no graph, as without the operators; of one that stops here a derivative would be None
def _backward(ctx: Any, upstreams: Sequence[Tensor | None]) -> tuple[Any, ...]:
    upstream, n = upstreams[0], ctx.n
    if upstream is None:
        return None, None, [None] * n, [None] * n, *(None,) * 9
    if ctx.deferred:
        target, gate_logits, *tensors = ctx.saved_tensors
        given = mixture_backward(upstream, target, gate_logits, tensors[:n], tensors[n:], ctx.needs, *ctx.rest)
    else:
        given = [(gradient * upstream.reshape(-1, 1)).to(gradient.dtype) for gradient in ctx.saved_tensors]
    remaining = iter(given)
    gate, *tensors = [next(remaining) if need else None for need in ctx.needs]
    return None, gate, list(tensors[:n]), list(tensors[n:]), *(None,) * 9


mixture_forward.register_autograd(_backward, setup_context=_save)


def _deferred(reduction: str, needs: Sequence[bool], dtype: torch.dtype) -> bool:
    n = (len(needs) - 1) // 2
    return (reduction == "none" and any(needs[1 + n :])) or (dtype == torch.float16 and any(needs[1:]))


def _settings(
    group: str, start: int, size: int, ignore: int, reduction: str, smoothing: float, z_loss: float
) -> Settings:
    ranks = dist.distributed_c10d._resolve_process_group(group) if group else None  # type: ignore[arg-type]
    return Settings(ranks, start, size, ignore, smoothing, z_loss, reduction)


def _run(
    target: Tensor,
    gate_logits: Tensor,
    hidden: Sequence[Tensor],
    heads: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
    settings: Settings,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, row losses, the leaves that need a gradient) from a backend's own autograd node."""
    n = len(hidden)
    with torch.enable_grad():
        leaves = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip((gate_logits, *hidden, *heads), needs, strict=True)
        ]
        problem = Problem(tuple(leaves[1 : 1 + n]), tuple(leaves[1 + n :]), leaves[0], target, settings)
        loss, row_losses = backend_loss(problem, backend)
    return loss, row_losses, [leaf for leaf in leaves if leaf.requires_grad]


def backend_loss(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    match backend:
        case "gate_only":
            return gate_only.mixture_loss(problem)
        case "streaming":
            from ultrafuser_mega.ops import streaming  # needs triton

            return streaming.mixture_loss(problem)
        case _:
            return chunked.mixture_loss(problem)
