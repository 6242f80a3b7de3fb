"""The decoder's own operations against their definitions, and their gradients against differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ultrafuser_mega.models.elementwise import rms_norm, rotate, swiglu

EPS = 1e-5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    turn = torch.arange(tokens, dtype=torch.float64)[:, None] / 10.0 ** torch.arange(half, dtype=torch.float64)
    return turn.cos()[:, None, None], turn.sin()[:, None, None]


def test_norm_is_llamas_in_the_type_that_it_is_rounded_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = normal(7, 1, 16, dtype=dtype), normal(16, seed=1, dtype=dtype)
        wide = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
        # two roundings to the type, and float32's of 16 squares
        torch.testing.assert_close(
            rms_norm(x, weight, EPS).double(), wide * weight.double(), rtol=2 * torch.finfo(dtype).eps, atol=0
        )
        assert rms_norm(x, weight, EPS).dtype == dtype


def test_swiglu_is_silu_of_one_half_times_the_other() -> None:
    x = normal(5, 1, 12)
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :6]) * x[..., 6:], rtol=1e-14, atol=1e-15)


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    x, (cos, sin) = normal(6, 1, 3, 8), angles(6, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], dim=-1))


def test_gradients_are_those_of_small_differences() -> None:
    x, weight = normal(4, 1, 6).requires_grad_(), normal(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (normal(4, 1, 6).requires_grad_(),))
    cos, sin = angles(4, 3)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (normal(4, 1, 2, 6).requires_grad_(),))


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_only_the_gradients_that_are_needed_are_computed(needed: str) -> None:
    x, weight = normal(4, 6), normal(6)
    (x if needed == "x" else weight).requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    assert (x.grad is not None) == (needed == "x") and (weight.grad is not None) == (needed == "weight")
