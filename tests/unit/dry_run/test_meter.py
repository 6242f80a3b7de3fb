"""What the dry run's meter counts, on tensors small enough to count by hand."""

from __future__ import annotations

import torch
from torch import nn

from ultrafuser_mega.dry_run.meter import Meter


def test_bytes_are_those_of_living_storages_by_kind_and_the_peak_is_kept() -> None:
    with Meter("cpu", {}) as meter:
        with meter.making("weights"):
            weight = torch.zeros(256, 4)  # 4096 bytes
        with meter.making("activations"):
            view = weight[:128]
            twice = weight * 2
            more = twice + 1
            del twice
        assert view.shape == (128, 4)
        assert dict(meter.memory.now) == {"weights": 4096, "activations": 4096}
        assert meter.memory.peak == 3 * 4096
        assert meter.memory.at_peak == {"weights": 4096, "activations": 2 * 4096}
        meter.clear()
        assert meter.memory.peak == 2 * 4096
        del more
        meter.rename("activations", "optimizer")
        assert dict(meter.memory.now) == {"weights": 4096, "optimizer": 0}


def test_small_storages_count_as_the_allocator_rounds_them() -> None:
    with Meter("cpu", {}) as meter:
        kept = torch.zeros(3)
        assert sum(meter.memory.now.values()) == 512
        del kept


def test_flops_of_products_and_attention_are_counted_once_each_way() -> None:
    linear = nn.Linear(8, 16, bias=False)
    x = torch.zeros(4, 8, requires_grad=True)
    with Meter("cpu", {}) as meter:
        linear(x).sum().backward()
    assert meter.flops == {"products": 3 * 2 * 4 * 8 * 16}  # forward, and both gradients


def test_attention_on_a_cpu_counts_scores_and_their_gradients() -> None:
    q, k, v = (torch.zeros(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with Meter("cpu", {}) as meter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    product = 2 * 2 * 6 * 6 * 8  # heads, queries, keys, width
    assert meter.flops == {"attention": (2 + 5) * product}  # the backward takes the scores anew


def test_an_accumulating_product_into_a_wider_type_is_counted() -> None:
    out = torch.zeros(4, 16)
    with Meter("cpu", {}) as meter:
        out.addmm_(torch.zeros(4, 8), torch.zeros(8, 16), beta=1)
    assert meter.flops == {"products": 2 * 4 * 8 * 16}
