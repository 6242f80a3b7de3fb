"""The memory-bound operations of a decoder layer, each one autograd node that keeps its input and little else.

Written as torch's single operations, each would be a chain of nodes with a saved temporary behind every one: host time
and memory. Here a node's forward and its backward are one operator each. On CUDA elementwise_triton.py runs it, as one
kernel that reads and writes every number once; elsewhere the formula below does. Either rounds as transformers does:
statistics in float32, results in the hidden states' type.
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

from ultrafuser_mega.ops.operators import register

FORMULAS: dict[str, Callable[..., Any]] = {}  # of every operator; what the kernels are held to and measured beside


def _operator(arguments: str, empty: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a formula the operator ultrafuser::<its name>, which elementwise_triton's function of that name is on CUDA.

    Args:
        arguments: and results, as PyTorch's schemas have them.
        empty: from the arguments the results without numbers, for fake tensors.
    """

    def as_operator(formula: Callable[..., Any]) -> Callable[..., Any]:
        name = formula.__name__
        FORMULAS[name] = formula
        return register(name + arguments, formula, empty, cuda=lambda *given: getattr(_kernels(), name)(*given))

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


def _empty_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:1], *(1,) * back, *x.shape[-2:])) for x in (q, k))


@_operator("(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)", _empty_turned)
def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """From (T, 1, heads, e) to (T, heads, e), each pair (x_i, x_{i + e / 2}) turned by its angle; or all that back."""
    if back:
        return _turned(q[:, None], cos, sin, -1.0), _turned(k[:, None], cos, sin, -1.0)
    return _turned(q, cos, sin, 1.0).squeeze(1), _turned(k, cos, sin, 1.0).squeeze(1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = x.new_empty(x.shape)
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turned: tuple[Tensor, Tensor] = rotate_both(q, k, cos, sin, False)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dq, dk = rotate_both(dq, dk, *ctx.saved_tensors, True)
        return dq, dk, None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding by cos and sin (T, 1, 1, e / 2): the halves of a head are its pairs.

    q (T, 1, heads, e) and k (T, 1, groups, e) come out as (T, heads, e) and (T, groups, e). They are not written over:
    before, they are views of what the projection made, and its other part is still to be read.
    """
    turned: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)
    return turned
