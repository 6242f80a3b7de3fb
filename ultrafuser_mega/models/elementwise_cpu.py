"""elementwise.py on a CPU in float32: csrc/cpu_elementwise.cpp, every number read and written once.

On torch.get_num_threads() threads, whose number does not change a bit of what comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from ultrafuser_mega.models import _cpu_elementwise
except ImportError as error:
    raise ImportError(
        "ultrafuser_mega.models: its C++ extension is not built;"
        " run `pip install .`, or `python setup.py build_ext --inplace` in a checkout"
        f" ({error})"
    ) from None


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """elementwise.rms_norm_forward."""
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
    _cpu_elementwise.rms_norm_forward(
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        rstd.numel(),
        width,
        y.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """elementwise.rms_norm_backward."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx, dw = torch.empty_like(x), torch.empty_like(weight)
    _cpu_elementwise.rms_norm_backward(
        dy.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        len(weight),
        dx.data_ptr(),
        dw.data_ptr(),
        torch.get_num_threads(),
    )
    return dx, dw


def swiglu_forward(x: Tensor) -> Tensor:
    """elementwise.swiglu_forward."""
    x, width = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    _cpu_elementwise.swiglu_forward(
        x.data_ptr(), y.numel() // max(width, 1), width, y.data_ptr(), torch.get_num_threads()
    )
    return y


def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """elementwise.swiglu_backward."""
    dy, x, width = dy.contiguous(), x.contiguous(), dy.shape[-1]
    dx = torch.empty_like(x)
    rows = dy.numel() // max(width, 1)
    _cpu_elementwise.swiglu_backward(dy.data_ptr(), x.data_ptr(), rows, width, dx.data_ptr(), torch.get_num_threads())
    return dx


def rotated_heads_forward(mixed: Tensor, cos: Tensor, sin: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """elementwise.rotated_heads_forward."""
    mixed, cos, sin = mixed.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, half = len(mixed), cos.shape[-1]
    each = mixed.shape[1] // (2 * half * groups) - 2
    q, k, v = (mixed.new_empty((tokens, heads, 2 * half)) for heads in (groups * each, groups, groups))
    _cpu_elementwise.rotated_heads_forward(
        mixed.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        groups,
        each,
        half,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        torch.get_num_threads(),
    )
    return q, k, v


def rotated_heads_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """elementwise.rotated_heads_backward."""
    dq, dk, dv, cos, sin = (t.contiguous() for t in (dq, dk, dv, cos, sin))
    (tokens, groups, width), each = dk.shape, dq.shape[1] // dk.shape[1]
    mixed = dq.new_empty((tokens, groups * (each + 2) * width))
    _cpu_elementwise.rotated_heads_backward(
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        groups,
        each,
        width // 2,
        mixed.data_ptr(),
        torch.get_num_threads(),
    )
    return mixed
