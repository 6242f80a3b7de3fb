"""Products of oneDNN where MKL's are narrow: the same numbers, of operands and results in any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ultrafuser_mega.dry_run.meter import Meter
from ultrafuser_mega.ops import gemm

M, K, P = 37, 72, 50
BY_ONEDNN, BY_MKL = "mkldnn._linear_pointwise", "aten.addmm_"

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def narrow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_mkl_is_narrow", lambda: True)
    monkeypatch.setattr(gemm, "ONEDNN_FROM", 1)
    monkeypatch.setattr(gemm, "ONEDNN_STEP", 16)


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of random numbers; "turned" is the transpose of a matrix, "pitched" has room between its rows."""
    generator = torch.Generator().manual_seed(rows + columns)
    if layout == "turned":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    return torch.randn(rows, columns + (layout == "pitched") * 16, generator=generator).to(dtype)[:, :columns]


def bound(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """Of what any order of summation may be off: each of K products and sums rounds once, of the sum of magnitudes."""
    sizes = a.double().abs() @ b.double().abs() + (0 if added is None else added.double().abs())
    return (K + 2) * torch.finfo(torch.float32).eps / 2 * sizes


def counted(call: Any) -> tuple[dict[str, int], int]:
    """(calls of each operation, FLOPs)."""
    with Meter("cpu", {}) as meter:
        call()
    return meter.operations, meter.flops["products"]


def both_ways(out: Tensor, a: Tensor, b: Tensor) -> dict[str, int]:
    """Calls of each operation where a product is added to ``out`` and another is given out."""

    def calls() -> None:
        gemm.accumulate(out, a, b, add=True)
        gemm.product(a, b)

    return counted(calls)[0]


@pytest.mark.parametrize("layout_b", ["plain", "turned", "pitched"])
@pytest.mark.parametrize("layout_a", ["plain", "turned", "pitched"])
def test_onednns_product_is_the_product_in_any_layout(layout_a: str, layout_b: str) -> None:
    a, b = matrix(M, K, layout_a), matrix(K, P, layout_b)
    found: list[Tensor] = []
    operations, flops = counted(lambda: found.append(gemm.product(a, b)))
    assert ((found[0].double() - a.double() @ b.double()).abs() <= bound(a, b)).all()
    assert operations[BY_ONEDNN] == 1
    assert flops == 2 * M * K * P


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("layout", ["plain", "pitched"])
def test_onednns_product_is_added_to_or_written_over_what_is_there(layout: str, add: bool) -> None:
    a, b, out = matrix(M, K, "turned"), matrix(K, P, "plain"), matrix(M, P, layout)
    before = out.clone() if add else torch.zeros(M, P)
    operations, _ = counted(lambda: gemm.accumulate(out, a, b, add=add))
    assert ((out.double() - before.double() - a.double() @ b.double()).abs() <= bound(a, b, before)).all()
    assert operations[BY_ONEDNN] == 1


def test_what_is_written_over_may_be_nan() -> None:
    out = torch.full((M, P), float("nan"))
    gemm.accumulate(out, matrix(M, K, "plain"), matrix(K, P, "plain"), add=False)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_stay_with_pytorchs_products(dtype: torch.dtype) -> None:
    a, b = matrix(M, K, "plain", dtype), matrix(K, P, "turned", dtype)
    out = torch.zeros(M, P, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert both_ways(out, a, b)[BY_ONEDNN] == 0


def test_small_products_stay_with_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "ONEDNN_FROM", M * K * P + 1)
    a, b = matrix(M, K, "plain"), matrix(K, P, "plain")
    operations = both_ways(torch.zeros(M, P), a, b)
    assert operations[BY_ONEDNN] == 0
    assert operations[BY_MKL] == operations["aten.mm"] == 1


class _Shapes(TorchDispatchMode):
    """Of the operands of oneDNN's products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.Size, torch.Size]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            self.seen.add((args[0].shape, args[1].shape))
        return func(*args, **kwargs or {})


def test_any_number_of_tokens_has_one_of_few_shapes() -> None:
    """OneDNN keeps a program for each: of as many as there are numbers of tokens memory would grow for long."""
    weight = matrix(P, K, "plain")
    with _Shapes() as shapes:
        for tokens in range(1, 65):
            states, upstream = torch.ones(tokens, 1, K), torch.ones(tokens, P)
            gemm.product(states, weight.t())
            gemm.accumulate(torch.zeros(P, K), upstream.t(), states[:, 0], add=True)
    assert len(shapes.seen) == 2 * 64 // 16


@pytest.mark.parametrize(("inner", "outer"), [(K, P), (P, K)], ids=["the first operand", "what is written"])
def test_large_operands_stay_with_pytorchs_products(monkeypatch: pytest.MonkeyPatch, inner: int, outer: int) -> None:
    out, a, b = torch.zeros(M, outer), matrix(M, inner, "plain"), matrix(inner, outer, "plain")
    largest = M // gemm.ONEDNN_STEP * gemm.ONEDNN_STEP * max(inner, outer)
    for limit, calls in ((largest, 2), (largest - 1, 0)):
        monkeypatch.setattr(gemm, "ONEDNN_TO", limit)
        assert both_ways(out, a, b)[BY_ONEDNN] == calls


def test_fake_tensors_count_onednns_product_as_real_ones_do() -> None:
    def added() -> None:
        gemm.accumulate(torch.zeros(M, P), torch.ones(M, K), torch.ones(K, P), add=True)

    with FakeTensorMode():
        fake = counted(added)
    assert fake == counted(added)
    assert fake[1] == 2 * M * K * P
