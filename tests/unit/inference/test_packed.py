"""Weights that are laid out for a CPU's products: the same layers, the same model."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (40, 7), (0, 7)])
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 9, bias=bias)
    rows = torch.randn(*shape)
    packed = PackedLinear(layer, counts=True)
    exact = nn.functional.linear(
        rows.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    terms = nn.functional.linear(rows.abs().double(), layer.weight.abs().double()) + 1.0  # the bias is below 1
    with torch.no_grad():
        found = packed(rows)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= 8 * 2.0**-24 * terms).all())  # 8 sums, in any order


def test_an_embedding_that_shares_a_layers_weight_keeps_its_own() -> None:
    embedding, head, other = nn.Embedding(9, 7), nn.Linear(7, 9, bias=False), nn.Linear(7, 7)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "other": other})
    before = {id(p): p.numel() for p in model.parameters()}
    pack(model)
    assert isinstance(model["head"], PackedLinear) and isinstance(model["other"], PackedLinear)
    assert sum(p.numel() for p in model.parameters()) == sum(before.values())
    ids = torch.arange(9)
    with torch.no_grad():
        torch.testing.assert_close(model["head"](embedding(ids)), embedding.weight @ embedding.weight.T)


def test_no_more_than_one_layer_is_held_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3))
    stored = [weakref.ref(part.weight) for part in model.modules() if isinstance(part, nn.Linear)]
    held = []

    def lay_out(weight: Any, rows: int, reorder: Any = torch.ops.mkldnn._reorder_linear_weight) -> Any:
        held.append(sum(weight() is not None for weight in stored))
        return reorder(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lay_out)
    pack(model)
    assert held == [6, 5, 4, 3, 2, 1]


def test_other_element_types_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float64))
    pack(model)
    assert all(type(part) is nn.Linear for part in model)


def test_a_model_that_is_opened_on_a_cpu_in_float32_is_packed(release: Path) -> None:
    with opened_model(f"{release}@code", "cpu", "fp32") as opened:
        kinds = {type(part) for part in opened.model.specialists.modules()}
        assert PackedLinear in kinds and nn.Linear not in kinds
    with opened_model(f"{release}@code", "cpu", "bf16") as opened:
        assert PackedLinear not in {type(part) for part in opened.model.specialists.modules()}
