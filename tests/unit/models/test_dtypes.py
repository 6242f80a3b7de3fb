"""A narrower element type rounds, but makes nothing infinite."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.dtypes import narrowed

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("values", "stored", "dtype"),
    [
        ([1 / 3, -65504.0, 65519.0], FP32, FP16),  # 65520 is halfway to what would be the next number
        ([1 / 3, -3.3e38], FP32, BF16),
        ([65504.0, 6e-8], FP16, BF16),
        ([torch.inf, torch.nan, 2.0], FP32, FP16),  # as they are stored
    ],
)
def test_what_the_range_holds_is_rounded(values: list[float], stored: torch.dtype, dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=stored)
    assert torch.equal(narrowed(tensor, dtype, "t").nan_to_num(7.0), tensor.to(dtype).nan_to_num(7.0))


@pytest.mark.parametrize(
    ("values", "stored", "dtype", "message"),
    [
        ([1.0, 66000.0, -70000.0], FP32, FP16, "70000, is beyond float16, which ends at 65504; use fp32 or bf16"),
        ([torch.nan, torch.inf, 7e4], BF16, FP16, "70144, is beyond float16, which ends at 65504; use fp32 or bf16"),
        ([3.4e38], FP32, BF16, "3.4e+38, is beyond bfloat16, which ends at 3.38953e+38; use fp32"),
    ],
)
def test_what_it_does_not_hold_is_refused_with_the_largest_value(
    values: list[float], stored: torch.dtype, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        narrowed(torch.tensor(values, dtype=stored), dtype, "folder: tensor t")
    assert str(caught.value) == f"folder: tensor t: its largest value, {message}"
