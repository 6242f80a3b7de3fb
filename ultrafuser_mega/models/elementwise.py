"""The memory-bound operations of a decoder layer, each one autograd node that keeps its input and little else.

Written as torch's single operations, each would be a chain of nodes with a saved temporary behind every one: host time
and memory. Every backward here is the formula beside it. Numbers are rounded as in transformers: statistics in float32,
results in the hidden states' type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    """y = round(x r) w with r = (mean(x^2) + eps)^-1/2.

    With n = x r and g = dy w:  dx = r (g - n mean(g n)),  dw = sum over rows of dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd  # in the type of rstd, unrounded
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = dy * weight.to(rstd.dtype)
            along = torch.linalg.vecdot(g, normed)[..., None].div_(x.shape[-1])
            dx = g.addcmul_(normed, along, value=-1).mul_(rstd).to(x.dtype)
        return dx, dw, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm of x (..., d) by weight (d,), in the type of ``x``."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


class _SwiGlu(torch.autograd.Function):
    """y = silu(a) b for x = [a, b].  da = dy b silu'(a),  db = dy silu(a)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a, b = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        da, db = dx.chunk(2, dim=-1)
        torch.mul(dy, F.silu(a), out=db)
        torch.ops.aten.silu_backward.grad_input(dy * b, a, grad_input=da)
        return dx


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of x (..., 2 f) times the second: (..., f)."""
    out: Tensor = _SwiGlu.apply(x)
    return out


class _Rotate(torch.autograd.Function):
    """Each pair (x_i, x_{i + e / 2}) turned by its angle; backward turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (T, 1, heads, e) by cos and sin (T, 1, 1, e / 2): the halves of a head are its pairs."""
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    return out
