"""Averages per class over the response tokens of a job, each counted once."""

from __future__ import annotations

import math

import torch

from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import LayoutPlan, plan_colocated, plan_disjoint
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.totals import ClassTotals, Totals

CLASSES = ["text", "code", "law"]
# Replica -> its microbatches of (classes of the rows, their losses); no row is about law.
ROWS = {
    0: [([0, 1, 1], [2.0, 1.0, 3.0]), ([0], [4.0])],
    1: [([1], [5.0])],
}


def reduce_rows(rank: int, plan: LayoutPlan) -> Totals:
    groups = make_groups(plan)
    totals = ClassTotals(CLASSES, ["loss", "negated"], torch.device("cpu"))
    if groups.is_last_stage:  # all ranks of a fusion group see the same rows
        for classes, losses in ROWS[groups.replica_index]:
            values = torch.tensor([[loss, -loss] for loss in losses])
            totals.add(torch.tensor(classes), values)
            totals.add(torch.tensor([len(CLASSES)]), torch.tensor([[9.0, 9.0]]))  # a filler
    return totals.reduce(groups, torch.tensor([rank, -rank]))


def check(plan: LayoutPlan) -> None:
    for totals in run_ranks(reduce_rows, plan.world_size, plan):  # the same on every rank
        assert totals.means["text"] == {"loss": 3.0, "negated": -3.0}
        assert totals.means["code"] == {"loss": 3.0, "negated": -3.0}
        assert totals.means.keys() == {"text", "code"}
        assert totals.counts == {"text": 2, "code": 3}
        assert totals.ranks.tolist() == [[rank, -rank] for rank in range(plan.world_size)]


def test_every_replica_counts_once_however_many_ranks_share_its_rows() -> None:
    check(plan_colocated(["a", "b"], tp=2, pp=1, dp=2))


def test_ranks_before_the_last_stage_add_nothing() -> None:
    check(plan_disjoint({"a": (1, 1, None), "b": (1, 2, None)}, dp=2))


def test_sums_are_exact_where_float32_would_lose_tokens() -> None:
    totals = ClassTotals(["text"], ["loss"], torch.device("cpu"))
    totals.add(torch.zeros(1, dtype=torch.int64), torch.tensor([[2.0**25]]))
    for _ in range(4):
        totals.add(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1))  # 2^25 + 1 is no float32
    assert math.isclose(totals._sums[0, 0].item(), 2.0**25 + 4, rel_tol=0)
