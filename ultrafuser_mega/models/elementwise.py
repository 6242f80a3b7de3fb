"""The memory-bound operations of a decoder layer, each one autograd node that keeps its input and little else.

Written as torch's single operations, each would be a chain of nodes with a saved temporary behind every one: host time
and memory. Here a node's forward and its backward are one operator each. On CUDA elementwise_triton.py runs it, as one
kernel that reads and writes every number once, on CPUs in float32 elementwise_cpu.py does so; elsewhere the formula
below. All round as transformers does: statistics in float32, results in the hidden states' type.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultrafuser_mega.models import elementwise_cpu
from ultrafuser_mega.ops.operators import register

FORMULAS: dict[str, Callable[..., Any]] = {}  # of every operator; what the kernels are held to and measured beside


def _operator(arguments: str, empty: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a formula the operator ultrafuser::<its name>, which elementwise_triton's function of that name is on CUDA,
    and elementwise_cpu's in float32 on CPUs.

    Args:
        arguments: and results, as PyTorch's schemas have them.
        empty: from the arguments the results without numbers, for fake tensors.
    """

    def as_operator(formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__
        FORMULAS[name] = formula
        compiled = getattr(elementwise_cpu, name)

        def on_cpu(*given: Any) -> Any:
            in_float32 = all(one.dtype == torch.float32 for one in given if isinstance(one, Tensor))
            return (compiled if in_float32 else formula)(*given)

        return register(
            name + arguments, formula, empty, cuda=lambda *given: getattr(_kernels(), name)(*given), cpu=on_cpu
        )

    return as_operator


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("ultrafuser_mega.models.elementwise_triton")  # needs triton


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_operator(
    "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=_statistics_dtype(x))),
)
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = round(x r) w, and r = (mean(x^2) + eps)^-1/2 of every row."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_statistics_dtype(x))
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd).to(x.dtype) * weight, rstd


@_operator(
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """With n = x r and g = dy w:  dx = r (g - n mean(g n)),  dw = sum over rows of dy n."""
    normed = x * rstd  # in the type of rstd, unrounded
    dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
    g = dy * weight.to(rstd.dtype)
    along = torch.linalg.vecdot(g, normed)[..., None].div_(x.shape[-1])
    return g.addcmul_(normed, along, value=-1).mul_(rstd).to(x.dtype), dw


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        dx, dw = rms_norm_backward(dy, *ctx.saved_tensors)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm of x (..., d) by weight (d,), both of one type."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


@_operator("(Tensor x) -> Tensor", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def swiglu_forward(x: Tensor) -> Tensor:
    """y = silu(a) b for x = [a, b]."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a).mul_(b)


@_operator("(Tensor dy, Tensor x) -> Tensor", lambda dy, x: x.new_empty(x.shape))
def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx = [da, db] with da = dy b silu'(a), db = dy silu(a)."""
    a, b = x.chunk(2, dim=-1)
    dx = x.new_empty(x.shape)
    da, db = dx.chunk(2, dim=-1)
    torch.mul(dy, F.silu(a), out=db)
    torch.ops.aten.silu_backward.grad_input(dy * b, a, grad_input=da)
    return dx


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y: Tensor = swiglu_forward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dx: Tensor = swiglu_backward(dy, *ctx.saved_tensors)
        return dx


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of x (..., 2 f) times the second: (..., f)."""
    out: Tensor = _SwiGlu.apply(x)
    return out


def _empty_heads(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, ...]:
    tokens, width = len(mixed), 2 * cos.shape[-1]
    queries = mixed.shape[-1] // width - 2 * groups
    return tuple(mixed.new_empty((tokens, heads, width)) for heads in (queries, groups, groups))


@_operator("(Tensor mixed, Tensor cos, Tensor sin, int groups) -> (Tensor, Tensor, Tensor)", _empty_heads)
def rotated_heads_forward(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with each pair (x_i, x_{i + e / 2}) turned by its angle, and values as they are."""
    by_group = mixed.reshape(len(mixed), groups, -1, 2 * cos.shape[-1])
    q, k, v = by_group.split_with_sizes([by_group.shape[2] - 2, 1, 1], 2)
    q, k = (_turn(x, cos, sin, 1.0, x.new_empty(x.shape)).flatten(1, 2) for x in (q, k))
    return q, k, v.squeeze(2).clone(memory_format=torch.contiguous_format)


@_operator(
    "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor",
    lambda dq, dk, dv, cos, sin: dq.new_empty((len(dq), sum(x.shape[1] for x in (dq, dk, dv)) * dq.shape[2])),
)
def rotated_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same pairs turned back, all at their places in the gradient of what they were taken from."""
    (tokens, groups, width), each = dk.shape, dq.shape[1] // dk.shape[1]
    mixed = dq.new_empty((tokens, groups, each + 2, width))
    to_q, to_k, to_v = mixed.split_with_sizes([each, 1, 1], 2)
    _turn(dq.unflatten(1, (groups, each)), cos, sin, -1.0, to_q)
    _turn(dk[:, :, None], cos, sin, -1.0, to_k)
    to_v.copy_(dv[:, :, None])
    return mixed.flatten(1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> Tensor:
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    return out


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        heads: tuple[Tensor, Tensor, Tensor] = rotated_heads_forward(mixed, cos, sin, groups)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
        return rotated_heads_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None


def rotated_heads(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (T, heads, e), rotated keys and values (T, groups, e), each of memory of its own.

    Args:
        mixed: (T, (heads + 2 groups) e): group after group its heads / groups queries, its key and its value. It is not
            needed afterwards.
        cos: (T, 1, 1, e / 2) of every position's angles; the halves of a head are its pairs.
        sin: the same.
        groups: key/value heads.
    """
    out: tuple[Tensor, Tensor, Tensor] = _RotatedHeads.apply(mixed, cos, sin, groups)
    return out
