"""A decoder layer's own kernels on a real GPU: against float64 and beside the formulas, in the shapes that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layer_operations import Case, differing, heads_cases, norm_cases, swiglu_cases, violations
from torch import Tensor

from ultrafuser_mega.models import elementwise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cuda").to(dtype)


def check(cases: list[Case]) -> None:
    for case in cases:
        operator = getattr(elementwise, case.operator)
        first, second = operator(*case.arguments), operator(*case.arguments)
        assert violations(case, first) == []
        assert differing(first, second) == 0
        formula = elementwise.FORMULAS[case.operator](*case.arguments)
        assert differing(first, formula) <= 0.01, case.operator  # as without a GPU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1000, 7), (8191, 128), (501, 576), (999, 5120), (300, 16384)])
def test_norm(rows: int, width: int, dtype: Any) -> None:
    x, dy = (normal(rows, 1, width, seed=seed, dtype=dtype) for seed in (0, 1))
    check(norm_cases(x, normal(width, seed=2, dtype=dtype), dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(7, 1), (300, 576), (999, 13824)])
def test_swiglu(rows: int, width: int, dtype: Any) -> None:
    check(swiglu_cases(normal(rows, 1, 2 * width, seed=0, dtype=dtype), normal(rows, 1, width, seed=1, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(40, 40, 128), (8, 2, 64), (3, 3, 80), (17, 1, 2)])
def test_heads_of_the_fused_projection(heads: int, groups: int, width: int, dtype: Any) -> None:
    mixed = normal(999, (heads + 2 * groups) * width, seed=0, dtype=dtype)
    dq, dk, dv = (normal(999, n, width, seed=seed, dtype=dtype) for seed, n in ((1, heads), (2, groups), (3, groups)))
    cos, sin = (part.to(dtype) for part in normal(2, 999, 1, 1, width // 2, seed=4, dtype=dtype))
    check(heads_cases(mixed, (dq, dk, dv), cos, sin))
