"""Who is slower than others of equal work, step after step, is named once; who has more to do is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from trio_13b import plan_13b

from ultrafuser_mega.training.stragglers import SCORE, STEPS, Stragglers, equal_units

UNLIKE = {
    "kind": "disjoint",
    "specialists": {"text": {"tp": 2}, "code": {"tp": 2}, "math": {"tp": 2, "pp": 2}},
}
REPLICAS = {"kind": "colocated", "tp": 1, "dp": 3}
SLOW = 1.05 / SCORE


def lines(layout: dict[str, Any], steps: list[list[float]], code_tokens: int = 100) -> list[str]:
    stragglers, tokens = Stragglers(plan_13b(layout)), {"text": 100, "code": code_tokens, "math": 100}
    return [line for step in steps if (line := stragglers.step(np.array(step), tokens))]


def test_tensor_parallel_ranks_are_one_and_equal_work_makes_equals_whatever_the_specialist() -> None:
    assert equal_units(plan_13b(UNLIKE)) == [[(6, 7)], [(4, 5)], [(0, 1), (2, 3)]]
    assert equal_units(plan_13b(REPLICAS)) == [[(0,), (1,), (2,)]]


def test_a_straggler_is_named_once() -> None:
    found = lines(REPLICAS, [[1.0, SLOW, 1.0]] * 3 * STEPS)
    assert found == [
        "straggler: rank 1 (text, code, math) took 1.5 times as long as the median of 2 others with equal work, "
        "20 steps in a row"
    ]


def test_ranks_that_wait_for_each_other_in_every_layer_are_named_together() -> None:
    found = lines(UNLIKE, [[1.0, 1.0, SLOW, SLOW, 9.0, 9.0, 9.0, 9.0]] * STEPS)
    assert [line.partition(" took")[0] for line in found] == ["straggler: ranks 2-3 (code)"]


def test_a_specialist_with_more_tokens_may_take_longer() -> None:
    steps = [[1.0, 1.0, SLOW, SLOW, 1.0, 1.0, 1.0, 1.0]] * STEPS
    assert lines(UNLIKE, steps) != [] and lines(UNLIKE, steps, code_tokens=150) == []


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [[1.0, SLOW, 1.0]] * (STEPS - 1) + [[1.0, 1.0, 1.0]] + [[1.0, SLOW, 1.0]] * (STEPS - 1), id="rests"
        ),
        pytest.param([[1.0, 0.95 / SCORE, 1.0]] * 3 * STEPS, id="by little"),
        pytest.param([[SLOW, 1.0, 1.0], [1.0, SLOW, 1.0]] * 3 * STEPS, id="by turns"),
    ],
)
def test_a_rank_that_is_slow_now_and_then_or_by_little_is_no_straggler(steps: list[list[float]]) -> None:
    assert lines(REPLICAS, steps) == []


def test_who_has_no_equals_is_compared_with_nobody() -> None:
    assert lines({"kind": "colocated", "tp": 2}, [[1.0, 9.0]] * 2 * STEPS) == []
