"""The exchange of hidden states: every rank of a fusion group gets all rows, every owner the whole gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ultrafuser_mega.runtime.exchange import HiddenExchange
from ultrafuser_mega.runtime.groups import RankGroups, make_groups
from ultrafuser_mega.runtime.layout import LayoutPlan, plan_colocated, plan_disjoint
from ultrafuser_mega.runtime.spawn import run_ranks

WIDTHS = {"wide": 5, "narrow": 3}
ROWS = (7, 1)  # 1 is fewer than some tp
PLANS = [
    plan_disjoint({"wide": (1, 1, None), "narrow": (1, 1, None)}, dp=1),
    plan_disjoint({"wide": (2, 1, None), "narrow": (1, 1, None)}, dp=1),
    plan_disjoint({"wide": (1, 1, None), "narrow": (2, 2, None)}, dp=1),
    plan_disjoint({"wide": (4, 1, None), "narrow": (3, 1, None)}, dp=1),  # of 7 rows: 2, 2, 2, 1 and 3, 3, 1
    plan_disjoint({"wide": (1, 1, 2), "narrow": (2, 1, 0)}, dp=1),  # not in the order of the ranks
    plan_disjoint({"wide": (2, 1, None), "narrow": (1, 1, None)}, dp=2),
    plan_colocated(["wide", "narrow"], tp=1, pp=1, dp=1),
    plan_colocated(["wide", "narrow"], tp=3, pp=1, dp=1),
    plan_colocated(["wide", "narrow"], tp=2, pp=2, dp=1),
]


def make_exchange(groups: RankGroups) -> HiddenExchange:
    assert groups.fusion is not None
    start = groups.replica_index * groups.plan.replica_size
    owners = {name: [start + rank for rank in p.last_stage] for name, p in groups.plan.placements.items()}
    return HiddenExchange(groups.fusion, groups.megatron.tp, owners, WIDTHS)


def whole_states(rows: int, replica: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(replica)
    return {name: torch.randn(rows, width, generator=generator) for name, width in WIDTHS.items()}


def partial_gradient(name: str, rows: int, fusion_rank: int) -> Tensor:
    """What the vocabulary rows of one rank of the fusion group contribute; whole numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(100 * fusion_rank + len(name))
    return torch.randint(-8, 9, (rows, WIDTHS[name]), generator=generator).float()


def round_trips(rank: int, plan: LayoutPlan) -> dict[int, dict[str, Any]]:
    """Of every number of rows, on the ranks of fusion groups."""
    groups = make_groups(plan)
    return {} if groups.fusion is None else {rows: round_trip(groups, rows) for rows in ROWS}


def round_trip(groups: RankGroups, rows: int) -> dict[str, Any]:
    assert groups.fusion is not None
    exchange = make_exchange(groups)
    whole = whole_states(rows, groups.replica_index)
    local = {name: whole[name].clone().requires_grad_() for name in exchange.local}
    everything = exchange(local)
    torch.autograd.backward(
        list(everything.values()),
        [partial_gradient(name, rows, groups.fusion.rank()) for name in everything],
    )
    return {
        "local": exchange.local,
        "received": {name: states.detach() for name, states in everything.items()},
        "gradients": {name: states.grad for name, states in local.items()},
    }


@pytest.mark.parametrize("plan", PLANS, ids=LayoutPlan.describe)
def test_states_reach_everyone_and_gradients_sum_at_their_owner(plan: LayoutPlan) -> None:
    results = run_ranks(round_trips, plan.world_size, plan)
    in_fusion = {rank for group in plan.fusion_groups() for rank in group}
    assert {rank for rank, result in enumerate(results) if result} == in_fusion
    for rows in ROWS:
        check(plan, rows, {rank: results[rank][rows] for rank in in_fusion})


def check(plan: LayoutPlan, rows: int, results: dict[int, dict[str, Any]]) -> None:
    members = plan.fusion_size
    parts = {name: [partial_gradient(name, rows, member) for member in range(members)] for name in WIDTHS}
    expected = {name: torch.stack(gradients).sum(0) for name, gradients in parts.items()}
    for rank, result in results.items():
        assert result["local"] == plan.specialists_on(rank)
        whole = whole_states(rows, plan.replica_of(rank))
        assert list(result["received"]) == list(WIDTHS)  # in configuration order, whoever owns what
        for name in WIDTHS:
            assert torch.equal(result["received"][name], whole[name])
        for name, gradient in result["gradients"].items():
            assert torch.equal(gradient, expected[name])


def sixteen_bit_sum(rank: int, plan: LayoutPlan) -> dict[str, Any]:
    groups = make_groups(plan)
    assert groups.fusion is not None
    exchange = make_exchange(groups)
    local = {name: torch.ones(4, WIDTHS[name], dtype=torch.bfloat16, requires_grad=True) for name in exchange.local}
    everything = exchange(local)
    part = 256.0 if groups.fusion.rank() == 0 else 1.0
    torch.stack([(states * part).sum() for states in everything.values()]).sum().backward()
    return {name: states.grad for name, states in local.items()}


@pytest.mark.parametrize(
    "plan",
    [
        plan_disjoint({"wide": (2, 1, None), "narrow": (1, 1, None)}, dp=1),
        plan_colocated(["wide", "narrow"], tp=3, pp=1, dp=1),
    ],
    ids=LayoutPlan.describe,
)
def test_bf16_gradients_are_summed_in_float32(plan: LayoutPlan) -> None:
    """bf16 has 8 bits: 256 + 1 is 256 again, so three ranks' 256 + 1 + 1 only comes to 258 in float32."""
    for gradients in run_ranks(sixteen_bit_sum, 3, plan):
        for gradient in gradients.values():
            assert gradient.dtype == torch.bfloat16
            assert (gradient == 258).all()
