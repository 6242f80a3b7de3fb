"""Which rank does what: layouts written out by hand, impossible ones refused, and what holds for every one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.layout import LayoutPlan, choose_plan, plan_colocated, plan_disjoint, plan_that_fits


def disjoint(dp: int = 1, **sizes: tuple[int, int]) -> LayoutPlan:
    return plan_disjoint({name: (tp, pp, None) for name, (tp, pp) in sizes.items()}, dp)


def test_default_layout_of_eight_ranks() -> None:
    plan = disjoint(text=(2, 1), code=(2, 1), math=(2, 2))
    assert plan.describe() == "disjoint: text tp=2 (ranks 0-1), code tp=2 (ranks 2-3), math tp=2 pp=2 (ranks 4-7)"
    assert plan.world_size == 8
    assert plan.tensor_groups("text") == [[0, 1]]
    assert plan.tensor_groups("code") == [[2, 3]]
    assert plan.tensor_groups("math") == [[4, 5], [6, 7]]  # first stage, last stage
    assert plan.pipeline_groups("text") == [[0], [1]]
    assert plan.pipeline_groups("math") == [[4, 6], [5, 7]]
    assert plan.fusion_groups() == [[0, 1, 2, 3, 6, 7]]  # not math's first stage
    assert plan.data_groups() == [[rank] for rank in range(8)]
    assert plan.replica_groups() == [list(range(8))]
    assert [plan.specialists_on(rank) for rank in (0, 3, 4, 7)] == [["text"], ["code"], ["math"], ["math"]]


def test_two_replicas_lie_on_consecutive_ranks() -> None:
    plan = disjoint(dp=2, text=(2, 1), code=(1, 1))
    assert plan.describe() == "disjoint: text tp=2 (ranks 0-1), code tp=1 (rank 2), dp=2"
    assert plan.world_size == 6
    assert plan.tensor_groups("text") == [[0, 1], [3, 4]]
    assert plan.tensor_groups("code") == [[2], [5]]
    assert plan.fusion_groups() == [[0, 1, 2], [3, 4, 5]]
    assert plan.replica_groups() == [[0, 1, 2], [3, 4, 5]]
    assert plan.data_groups() == [[0, 3], [1, 4], [2, 5]]
    assert [plan.replica_of(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert plan.specialists_on(5) == ["code"]


def test_colocated_specialists_share_every_group() -> None:
    plan = plan_colocated(["text", "code"], tp=2, pp=2, dp=1)
    assert plan.describe() == "colocated: text, code all on tp=2 pp=2"
    assert plan.world_size == 4
    for name in ("text", "code"):
        assert plan.tensor_groups(name) == [[0, 1], [2, 3]]
        assert plan.pipeline_groups(name) == [[0, 2], [1, 3]]
    assert plan.fusion_groups() == [[2, 3]]
    assert [plan.specialists_on(rank) for rank in range(4)] == [["text", "code"]] * 4


def test_first_rank_puts_specialists_in_another_order() -> None:
    plan = plan_disjoint({"text": (2, 1, 2), "code": (2, 1, 0)}, dp=1)
    assert plan.tensor_groups("text") == [[2, 3]]
    assert plan.specialists_on(0) == ["code"]


def test_overlapping_ranks_are_named() -> None:
    sizes = {"text": (2, 1, 0), "code": (2, 2, 1), "math": (1, 1, None)}
    with pytest.raises(InputError, match=r"specialists text and code both want rank\(s\) 1;.*kind: colocated"):
        plan_disjoint(sizes, dp=1)


def test_ranks_without_a_specialist_are_named() -> None:
    with pytest.raises(InputError, match=r"rank\(s\) 2, 3 have no specialist"):
        plan_disjoint({"text": (2, 1, None), "code": (1, 1, 4)}, dp=1)


def test_first_layout_of_the_launched_size_is_taken() -> None:
    plans = [disjoint(a=(2, 1), b=(2, 1)), plan_colocated(["a", "b"], 2, 2, 1), plan_colocated(["a", "b"], 1, 1, 1)]
    assert choose_plan(plans, 4) is plans[0]
    assert choose_plan(plans, 1) is plans[2]


def test_rank_count_without_a_layout_says_which_counts_have_one() -> None:
    plans = [plan_colocated(["a"], 2, 2, 1), plan_colocated(["a"], 1, 1, 1), plan_colocated(["a"], 4, 1, 1)]
    with pytest.raises(InputError, match=r"none of the configured layouts uses 5 rank\(s\); launch with 1 or 4, or"):
        choose_plan(plans, 5)


sizes = st.integers(1, 4)
plans = st.one_of(
    st.builds(
        lambda shapes, dp: disjoint(dp, **{f"s{i}": shape for i, shape in enumerate(shapes)}),
        st.lists(st.tuples(sizes, sizes), min_size=1, max_size=4),
        sizes,
    ),
    st.builds(
        lambda n, tp, pp, dp: plan_colocated([f"s{i}" for i in range(n)], tp, pp, dp), sizes, sizes, sizes, sizes
    ),
)


@given(plans)
def test_every_rank_has_one_place_in_every_kind_of_group(plan: LayoutPlan) -> None:
    everyone = list(range(plan.world_size))
    assert flat(plan.data_groups()) == everyone
    assert flat(plan.replica_groups()) == everyone
    for name, placement in plan.placements.items():
        mine = [rank for rank in everyone if name in plan.specialists_on(rank)]
        assert len(mine) == placement.tp * placement.pp * plan.dp
        assert flat(plan.tensor_groups(name)) == mine
        assert flat(plan.pipeline_groups(name)) == mine
        assert {len(group) for group in plan.tensor_groups(name)} == {placement.tp}
        assert {len(group) for group in plan.pipeline_groups(name)} == {placement.pp}
    assert all(plan.specialists_on(rank) for rank in everyone)


@given(plans)
def test_fusion_groups_are_the_last_stages_of_one_replica_each(plan: LayoutPlan) -> None:
    groups = plan.fusion_groups()
    assert len(groups) == plan.dp
    assert {len(group) for group in groups} == {plan.fusion_size}
    last_stages = {group[-1] for name in plan.placements for group in plan.pipeline_groups(name)}
    assert flat(groups) == sorted(last_stages)
    assert [{plan.replica_of(rank) for rank in group} for group in groups] == [{r} for r in range(plan.dp)]


def flat(groups: list[list[int]]) -> list[int]:
    """All members in order; a rank that is in two groups shows up twice."""
    return sorted(itertools.chain.from_iterable(groups))


def test_of_the_ranks_that_are_left_a_layout_takes_what_it_fits() -> None:
    plans = [plan_colocated(["text"], size, 1, 1) for size in (8, 4, 6)]
    assert [plan_that_fits(plans, ranks).world_size for ranks in (8, 7, 6, 5, 4)] == [8, 4, 6, 4, 4]
    with pytest.raises(InputError, match=r"layouts: 3 rank\(s\) are left, and all of the layouts use more"):
        plan_that_fits(plans, 3)
