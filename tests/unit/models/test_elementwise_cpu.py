"""The compiled operations of a decoder layer on a CPU, against float64, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.layer_operations import Case, heads_cases, norm_cases, swiglu_cases, violations
from torch import Tensor

from ultrafuser_mega.models import elementwise, elementwise_cpu


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).float()


@pytest.fixture(params=[1, 3])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(cases: list[Case]) -> None:
    for case in cases:
        answer = getattr(elementwise_cpu, case.operator)(*case.arguments)
        assert violations(case, answer) == []


def rotated(heads: int, groups: int, width: int, tokens: int = 5) -> list[Case]:
    half = width // 2
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 100.0 ** (torch.arange(half) / half)
    cos, sin = (part.float()[:, None, None] for part in (angle.cos(), angle.sin()))
    # As attention gives them: by token, by head, and one that is only a part of what lies in memory.
    dq = normal(tokens, heads, width, seed=5)
    dk = normal(groups, tokens, width, seed=6).transpose(0, 1)
    dv = normal(tokens, groups, 2 * width, seed=7)[..., width:]
    return heads_cases(normal(tokens, (heads + 2 * groups) * width, seed=1), (dq, dk, dv), cos, sin)


@pytest.mark.parametrize(("rows", "width"), [(37, 7), (200, 80), (1, 1), (130, 576), (3, 5120)])
def test_norm_is_right_in_any_width_and_number_of_rows(rows: int, width: int, threads: int) -> None:
    x, dy = (normal(rows, 1, width, seed=seed) for seed in (0, 1))
    x[0] *= 1e-3  # where eps counts
    check(norm_cases(x, normal(width, seed=2), dy))


@pytest.mark.parametrize(("rows", "width"), [(7, 1), (300, 352), (5, 576), (2, 13824)])
def test_swiglu_is_right_in_any_width(rows: int, width: int, threads: int) -> None:
    x = normal(rows, 1, 2 * width, seed=0, scale=3.0)
    x[0, 0, 0] = -200.0  # whose exponential is infinite
    check(swiglu_cases(x, normal(rows, 1, width, seed=1)))


@pytest.mark.parametrize(("heads", "groups", "width"), [(40, 40, 128), (8, 2, 64), (3, 1, 80), (15, 5, 2)])
def test_heads_are_right_in_any_number(heads: int, groups: int, width: int, threads: int) -> None:
    check(rotated(heads, groups, width))


def test_rows_may_lie_anywhere() -> None:
    x = normal(6, 2, 20, seed=0)
    for strided in (x[:, :, 3:17], x[::2], x.transpose(0, 1), x.transpose(0, 2)[:14]):
        for dy in (torch.ones(()).expand(strided.shape), normal(*strided.shape, seed=1).flip(-1)):
            check(norm_cases(strided, normal(strided.shape[-1], seed=2), dy))


def test_threads_change_no_bit() -> None:
    x, dy, weight = normal(1000, 96, seed=0), normal(1000, 96, seed=1), normal(96, seed=2)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        _, rstd = elementwise_cpu.rms_norm_forward(x, weight, 1e-5)
        found.append(elementwise_cpu.rms_norm_backward(dy, x, weight, rstd))
    torch.set_num_threads(before)
    for dx, dw in found[1:]:
        assert torch.equal(dx, found[0][0]) and torch.equal(dw, found[0][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_what_it_is_in_the_formula(bad: float) -> None:
    x, dy = normal(4, 12, seed=0), normal(4, 6, seed=1)
    x[1, 2] = bad
    for name, given in (("swiglu_forward", (x,)), ("swiglu_backward", (dy, x))):
        torch.testing.assert_close(
            getattr(elementwise_cpu, name)(*given), elementwise.FORMULAS[name](*given), equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_rows_are_no_trouble(dtype: torch.dtype) -> None:
    empty, weight = torch.empty(0, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    y, rstd = elementwise.rms_norm_forward(empty, weight, 1e-5)
    dx, dw = elementwise.rms_norm_backward(empty, empty, weight, rstd)
    assert y.shape == dx.shape == (0, 8) and torch.equal(dw, torch.zeros(8, dtype=dtype))
    assert elementwise.swiglu_forward(empty).shape == (0, 4)


def test_the_compiled_operations_read_float32_alone() -> None:
    x, dy = normal(5, 8, seed=0), normal(5, 8, seed=1)
    weight = normal(8, seed=2).bfloat16()
    y, rstd = elementwise.rms_norm_forward(x, weight, 1e-5)
    torch.testing.assert_close((y, rstd), elementwise.FORMULAS["rms_norm_forward"](x, weight, 1e-5), rtol=0, atol=0)
    for given in ((dy, x.bfloat16(), weight, rstd), (dy, x, weight, rstd)):
        expected = elementwise.FORMULAS["rms_norm_backward"](*given)
        torch.testing.assert_close(elementwise.rms_norm_backward(*given), expected, rtol=0, atol=0)
