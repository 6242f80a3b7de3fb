"""The operations of models/elementwise.py in float64, written apart from it, with what any right answer may be off by.

An answer and its bound have the same names. A bound counts the roundings to the type, u = eps / 2 each, and float32's
2^-24 each for as many terms as are added up, in whatever order that is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
F32 = 2.0**-24
FUNCTIONS = 2.0**-20  # of exp, rsqrt and divisions on a GPU: a few units in float32's last place


class Case(NamedTuple):
    operator: str  # of models/elementwise.py
    arguments: tuple[Any, ...]
    truth: tuple[Tensor, ...]  # float64
    bounds: tuple[Tensor, ...]


def violations(case: Case, answers: Any) -> list[str]:
    """Which of the operator's results are further from the truth than the arithmetic explains."""
    found = []
    for index, (answer, truth, bound) in enumerate(
        zip(answers if isinstance(answers, tuple) else (answers,), case.truth, case.bounds, strict=True)
    ):
        if answer.shape != truth.shape:
            found.append(f"{case.operator}[{index}] has the shape {tuple(answer.shape)}, not {tuple(truth.shape)}")
        excess = ((answer.double() - truth).abs() - bound).max().item()
        if not excess <= 0:
            found.append(f"{case.operator}[{index}] is {excess:.1e} further off than its bound")
    return found


def differing(answers: Any, others: Any) -> float:
    """The share of 16-bit numbers that are not the same in both."""
    pairs = zip(*(a if isinstance(a, tuple) else (a,) for a in (answers, others)), strict=True)
    same = torch.cat([(a == b).flatten() for a, b in pairs if torch.finfo(a.dtype).bits == 16] or [torch.ones(1)])
    return 1 - same.double().mean().item()


def norm_cases(x: Tensor, weight: Tensor, dy: Tensor) -> list[Case]:
    """x and dy (..., d)."""
    u, least, d = _unit(x.dtype), _least(x.dtype), x.shape[-1]
    f32 = _unit(torch.promote_types(x.dtype, torch.float32))
    wide, w, g = x.double(), weight.double(), dy.double()
    r = (wide.pow(2).sum(-1, keepdim=True) / d + EPS).pow(-0.5)
    n, gw = wide * r, g * w
    relative = d * f32 / 2 + _functions(x.dtype)  # of r: half the relative error of the sum
    y = n * w
    mean = (gw * n).mean(-1, keepdim=True)
    size = r * (gw.abs() + n.abs() * (gw * n).abs().mean(-1, keepdim=True))
    dx = r * (gw - n * mean)
    dw, dw_size = ((g * n).flatten(0, -2).sum(0), (g * n).abs().flatten(0, -2).sum(0))
    rows = x.numel() // d
    forward = Case(
        "rms_norm_forward",
        (x, weight, EPS),
        (y, r),
        ((2 * u + relative) * y.abs() + 2 * least * (1 + w.abs()), relative * r),
    )
    backward = Case(
        "rms_norm_backward",
        (dy, x, weight, r.to(torch.promote_types(x.dtype, torch.float32))),
        (dx, dw),
        (u * dx.abs() + (d + 8) * f32 * size + least, u * dw.abs() + (rows + 4) * f32 * dw_size + least),
    )
    return [forward, backward]


def swiglu_cases(x: Tensor, dy: Tensor) -> list[Case]:
    """x (..., 2 f), dy (..., f)."""
    u, least, functions = _unit(x.dtype), _least(x.dtype), _functions(x.dtype)
    (a, b), g = x.double().chunk(2, -1), dy.double()
    sigmoid = torch.sigmoid(a)
    y = a * sigmoid * b
    da, db = g * b * sigmoid * (1 + a * (1 - sigmoid)), g * a * sigmoid
    size = (g * b).abs() * sigmoid * (1 + a.abs())
    bounds = (2 * u + functions) * da.abs() + functions * size, (2 * u + functions) * db.abs()
    slack = least * torch.cat([1 + 2 * sigmoid * (1 + a.abs()), 1 + g.abs()], -1)
    return [
        Case("swiglu_forward", (x,), (y,), ((2 * u + functions) * y.abs() + least * (1 + b.abs()),)),
        Case("swiglu_backward", (dy, x), (torch.cat([da, db], -1),), (torch.cat(bounds, -1) + slack,)),
    ]


def heads_cases(mixed: Tensor, heads: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor) -> list[Case]:
    """mixed (T, all heads * e), of every group its queries, its key and its value; cos, sin (T, 1, 1, e / 2).

    heads: gradients of queries (T, heads, e), keys and values (T, groups, e).
    """
    dq, dk, dv = heads
    u, least = _unit(mixed.dtype), _least(mixed.dtype)
    f32 = _unit(torch.promote_types(mixed.dtype, torch.float32))
    turn = torch.complex(cos.double(), sin.double())[:, 0]
    groups, each = dk.shape[1], dq.shape[1] // dk.shape[1]

    def turned(x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.double().chunk(2, -1)
        z = torch.complex(first, second) * by
        out = torch.cat([z.real, z.imag], -1)
        one = torch.cat([(first * by.real).abs(), (second * by.real).abs()], -1)
        other = torch.cat([(second * by.imag).abs(), (first * by.imag).abs()], -1)
        return out, u * (out.abs() + one) + 4 * f32 * (one + other) + 2 * least

    whole = mixed.unflatten(1, (-1, dk.shape[2]))  # head after head
    groups_heads = whole.split(each + 2, dim=1)
    q = torch.cat([group[:, :each] for group in groups_heads], 1)
    k, v = (torch.stack([group[:, each + at] for group in groups_heads], 1) for at in (0, 1))
    exact = v.double(), torch.zeros(v.shape, dtype=torch.float64, device=v.device)
    forward = [turned(q, turn), turned(k, turn), exact]

    back_q, back_k = turned(dq, turn.conj()), turned(dk, turn.conj())
    exact = dv.double(), torch.zeros(dv.shape, dtype=torch.float64, device=dv.device)
    backward = []
    for of_q, of_k, of_v in zip(back_q, back_k, exact, strict=True):
        per_group = [
            torch.cat([of_q[:, g * each : (g + 1) * each], of_k[:, g, None], of_v[:, g, None]], 1)
            for g in range(groups)
        ]
        backward.append(torch.cat(per_group, 1).flatten(1))
    truths, bounds = zip(*forward, strict=True)
    return [
        Case("rotated_heads_forward", (mixed, cos, sin, groups), truths, bounds),
        Case("rotated_heads_backward", (dq, dk, dv, cos, sin), (backward[0],), (backward[1],)),
    ]


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _functions(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else FUNCTIONS


def _least(dtype: torch.dtype) -> float:
    """Half the distance of the smallest numbers: where rounding is no longer relative."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps
