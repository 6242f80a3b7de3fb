"""Rows that ranks share count once in the gradient norm, wherever the distributed optimizer cuts a parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ultrafuser_mega.runtime.shared_rows import SharedRows, counted_again, mark_shared


def parameter(rows: int, columns: int, seed: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Parameter(torch.zeros(rows, columns))
    made.main_grad = torch.randn(rows, columns, generator=generator)  # type: ignore[attr-defined]
    return made


def _squared(weight: nn.Parameter, rows: slice) -> float:
    return float(weight.main_grad[rows].square().sum())  # type: ignore[attr-defined]


def test_copies_of_all_ranks_together_count_once() -> None:
    weight, other = parameter(6, 5, seed=0), parameter(3, 5, seed=1)
    mark_shared(weight, SharedRows(first=4, copies=3))
    again = counted_again([weight, other], lambda parameter: slice(None))
    assert 3 * float(again) == pytest.approx(2 * _squared(weight, slice(4, None)))


@pytest.mark.parametrize("cut", range(31))
def test_parts_of_a_parameter_count_as_the_whole(cut: int) -> None:
    weight = parameter(6, 5, seed=0)
    mark_shared(weight, SharedRows(first=4, copies=2))
    before = float(counted_again([weight], lambda _: slice(0, cut)))
    after = float(counted_again([weight], lambda _: slice(cut, 30)))
    assert before + after == pytest.approx(_squared(weight, slice(4, None)) / 2)


def test_nothing_is_counted_again_where_nothing_is_shared() -> None:
    assert counted_again([parameter(6, 5, seed=0)], lambda parameter: slice(None)) == 0
