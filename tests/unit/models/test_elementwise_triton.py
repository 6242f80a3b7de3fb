"""The Triton kernels of a decoder layer without a GPU: interpreted, against float64 and beside the formulas; and as far
as the driver.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.layer_operations import Case, differing, heads_cases, norm_cases, swiglu_cases, violations
from torch import Tensor

from ultrafuser_mega.models import elementwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)


def answers(cases: list[Case], programs: int) -> list[Any]:
    """Of the kernels, which share rows out to so many programs."""
    from ultrafuser_mega.models import elementwise_triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise_triton, "PROGRAMS", programs)
        return [getattr(elementwise_triton, case.operator)(*case.arguments) for case in cases]


def check(cases: list[Case], interpreted: Any, programs: int = 2) -> None:
    found = interpreted(answers, cases, programs)
    for case, answer in zip(cases, found, strict=True):
        assert violations(case, answer) == []
        formula = elementwise.FORMULAS[case.operator](*case.arguments)
        assert violations(case, formula) == []
        # Float32 numbers that differ in their last bits are rounded alike, but for one in thousands. Were there a
        # rounding more or less, it would be every second.
        assert differing(answer, formula) <= 0.01, case.operator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"),
    [(37, 7), (200, 80), (5, 576), (3, 5120), pytest.param(5, 13824, marks=pytest.mark.slow)],
)
def test_norm_is_right_in_any_width_and_number_of_rows(rows: int, width: int, dtype: Any, interpreted: Any) -> None:
    x, dy = (normal(rows, 1, width, seed=seed, dtype=dtype) for seed in (0, 1))
    x[0] *= 1e-3  # where eps counts
    check(norm_cases(x, normal(width, seed=2, dtype=dtype), dy), interpreted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(7, 1), (5, 576), (3, 5120), (2, 13824)])
def test_swiglu_is_right_in_any_width(rows: int, width: int, dtype: Any, interpreted: Any) -> None:
    x = normal(rows, 1, 2 * width, seed=0, dtype=dtype, scale=3.0)
    x[0, 0, 0] = -200.0  # whose exponential is infinite
    check(swiglu_cases(x, normal(rows, 1, width, seed=1, dtype=dtype)), interpreted)


def rotated(mixed: Tensor, heads: int, groups: int, width: int) -> list[Case]:
    tokens, dtype, half = len(mixed), mixed.dtype, width // 2
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 100.0 ** (torch.arange(half) / half)
    cos, sin = (part.to(dtype)[:, None, None] for part in (angle.cos(), angle.sin()))
    # As attention gives them: by token, by head, and one that is only a part of what lies in memory.
    dq = normal(tokens, heads, width, seed=5, dtype=dtype)
    dk = normal(groups, tokens, width, seed=6, dtype=dtype).transpose(0, 1)
    dv = normal(tokens, groups, 2 * width, seed=7, dtype=dtype)[..., width:]
    return heads_cases(mixed, (dq, dk, dv), cos, sin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(40, 40, 128), (8, 2, 64), (3, 1, 80), (15, 5, 2)])
def test_heads_are_right_in_any_number(heads: int, groups: int, width: int, dtype: Any, interpreted: Any) -> None:
    check(rotated(normal(5, (heads + 2 * groups) * width, seed=1, dtype=dtype), heads, groups, width), interpreted)


def test_a_value_that_is_not_finite_stays_where_it_is(interpreted: Any) -> None:
    heads, groups, width = 4, 2, 16
    mixed = normal(5, (heads + 2 * groups) * width, seed=1, dtype=torch.float32)
    mixed[2, 3 * width + 1] = torch.inf  # the first group's value
    forward, backward = rotated(mixed, heads, groups, width)
    backward.arguments[2][2, 0, 1] = torch.inf
    (_, _, v), gradient = interpreted(answers, [forward, backward], 2)
    for found in (v[2, 0], gradient[2, 3 * width : 4 * width]):
        assert found.isinf().sum() == 1 and not found.isnan().any()


@pytest.mark.parametrize("per_group", [1, 3])
def test_rows_of_a_norm_may_lie_in_the_fused_projection(per_group: int, interpreted: Any) -> None:
    """As queries and keys are cut out of it, group by group."""
    groups, width, dtype = 3, 80, torch.bfloat16
    mixed = normal(5, groups, per_group + 2, width, seed=0, dtype=dtype)
    q, k, _ = mixed.split([per_group, 1, 1], dim=2)
    for x in (q, k):
        assert not x.is_contiguous()
        check(norm_cases(x, normal(width, seed=1, dtype=dtype), normal(*x.shape, seed=2, dtype=dtype)), interpreted)


def test_rows_may_lie_anywhere(interpreted: Any) -> None:
    dtype = torch.float32
    x = normal(6, 2, 20, seed=0, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    for strided in (x[:, :, 3:17], x[::2], x.transpose(0, 1), x.transpose(0, 2)[:14]):
        width = strided.shape[-1]
        for dy in (one.expand(strided.shape), normal(*strided.shape, seed=1, dtype=dtype).flip(-1)):
            check(norm_cases(strided, normal(width, seed=2, dtype=dtype), dy), interpreted)
            check(swiglu_cases(strided, dy[..., : width // 2]), interpreted)


@pytest.mark.parametrize("programs", [1, 3, 264])
def test_norms_weight_gradient_does_not_depend_on_who_sums_which_rows(programs: int, interpreted: Any) -> None:
    x, dy = (normal(301, 1, 130, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    check(norm_cases(x, normal(130, seed=2, dtype=torch.bfloat16), dy), interpreted, programs)


@cache
def gpu_of_this_process() -> Any:
    """One: compiled kernels keep the launcher they came with."""
    from absent_gpu import AbsentGpu

    return AbsentGpu(90)


def launches(tokens: int, width: int, dtype: torch.dtype) -> tuple[list[Any], int]:
    """Of all operators, called with tensors in the CPU's memory; and how many kernels were compiled so far."""
    from ultrafuser_mega.models import elementwise_triton

    gpu = gpu_of_this_process()
    gpu.launches.clear()
    gpu.stand_in()
    x, half = torch.zeros(tokens, 1, width, dtype=dtype), torch.zeros(tokens, 1, width // 2, dtype=dtype)
    q, cos = torch.zeros(tokens, 4, 16, dtype=dtype), torch.zeros(tokens, 1, 1, 8, dtype=dtype)
    elementwise_triton.rms_norm_forward(x, x[0, 0].clone(), 1e-5)
    elementwise_triton.rms_norm_backward(x, x, x[0, 0].clone(), x[..., :1].float())
    elementwise_triton.swiglu_forward(x)
    elementwise_triton.swiglu_backward(half, x)
    elementwise_triton.rotated_heads_forward(torch.zeros(tokens, 8 * 16, dtype=dtype), cos, cos, 2)
    elementwise_triton.rotated_heads_backward(q, q[:, :2], q[:, :2], cos, cos)
    kernels = [kernel for name, kernel in vars(elementwise_triton).items() if name.endswith("_kernel")]
    return gpu.launches, sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_every_operator_is_one_launch(compiling: Any) -> None:
    found, _ = compiling(launches, 300, 192, torch.bfloat16)
    assert [launch.kernel for launch in found] == [
        "rms_norm_forward_kernel",
        "rms_norm_backward_kernel",
        "swiglu_forward_kernel",
        "swiglu_backward_kernel",
        "rotated_heads_forward_kernel",
        "rotated_heads_backward_kernel",
    ]


def test_another_number_of_tokens_compiles_nothing(compiling: Any) -> None:
    counts = {tokens: compiling(launches, tokens, 320, torch.bfloat16)[1] for tokens in (300, 304, 1, 4097)}
    assert len(set(counts.values())) == 1, counts
