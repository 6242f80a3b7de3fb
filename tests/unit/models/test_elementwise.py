"""The decoder's own operations against their definitions, and their gradients against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ultrafuser_mega.models import elementwise
from ultrafuser_mega.models.elementwise import rms_norm, rotated_heads, swiglu

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
        # Two roundings to the type, half an eps each. Before them float32's: 16 squares and their sum in any order lose
        # 16 halves, which the root halves; two roots, a square, a quotient and a product one or two halves each.
        eps = torch.finfo(dtype).eps
        rtol = eps + eps**2 + 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(rms_norm(x, weight, EPS).double(), wide * weight.double(), rtol=rtol, atol=0)
        assert rms_norm(x, weight, EPS).dtype == dtype


def test_swiglu_is_silu_of_one_half_times_the_other() -> None:
    x = normal(5, 1, 12)
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :6]) * x[..., 6:], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
def test_heads_come_apart_and_rotation_is_multiplication_by_a_complex_number(heads: int, groups: int) -> None:
    each, (cos, sin) = heads // groups, angles(6, 4)
    whole = normal(6, heads + 2 * groups, 8)
    q, k, v = rotated_heads(whole.flatten(1), cos, sin, groups)
    queries = [g * (each + 2) + i for g in range(groups) for i in range(each)]
    keys = [g * (each + 2) + each for g in range(groups)]
    for turned, places in ((q, queries), (k, keys)):
        x = whole[:, places]
        expected = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, 0]
        torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], dim=-1))
    assert torch.equal(v, whole[:, [place + 1 for place in keys]])


def test_gradients_are_those_of_small_differences() -> None:
    x, weight = normal(4, 1, 6).requires_grad_(), normal(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (normal(4, 1, 6).requires_grad_(),))
    cos, sin = angles(4, 3)
    mixed = normal(4, 2 * (2 + 2) * 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda mixed: rotated_heads(mixed, cos, sin, 2), (mixed,))


class Operators(TorchDispatchMode):
    """What PyTorch dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def calls() -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    cos, sin = angles(4, 3)
    return {
        "rms_norm": (lambda x, weight: rms_norm(x, weight, EPS), (normal(4, 1, 6), normal(6))),
        "swiglu": (swiglu, (normal(4, 1, 6),)),
        "rotated_heads": (lambda mixed: rotated_heads(mixed, cos, sin, 2), (normal(4, 2 * (2 + 2) * 6),)),
    }


@pytest.mark.parametrize("name", calls())
def test_forward_and_backward_are_one_operator_each(name: str) -> None:
    function, inputs = calls()[name]
    for x in inputs:
        x.requires_grad_()
    with Operators() as forward:
        out = function(*inputs)
    upstream = [torch.ones_like(y) for y in out] if isinstance(out, tuple) else torch.ones_like(out)
    with Operators() as backward:
        torch.autograd.grad(out, inputs, upstream)
    assert (forward.seen, backward.seen) == ([f"ultrafuser::{name}_forward"], [f"ultrafuser::{name}_backward"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_have_the_shapes_and_types_of_real_ones(dtype: torch.dtype) -> None:
    x, weight, rstd = normal(4, 1, 6, dtype=dtype), normal(6, dtype=dtype), torch.ones(4, 1, 1)
    mixed, q, k = (normal(4, *shape, dtype=dtype) for shape in ((48,), (4, 6), (2, 6)))
    cos, sin = (x.to(dtype) for x in angles(4, 3))
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (elementwise.rms_norm_forward, (x, weight, EPS)),
        (elementwise.rms_norm_backward, (x, x, weight, rstd)),
        (elementwise.swiglu_forward, (x,)),
        (elementwise.swiglu_backward, (x[..., :3], x)),
        (elementwise.rotated_heads_forward, (mixed, cos, sin, 2)),
        (elementwise.rotated_heads_backward, (q, k, k, cos, sin)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
