"""Which ranks are persistently slower than others that have the same to do.

Tensor-parallel ranks wait for each other in every layer, so only together can they be told from others: a unit is such
a group. Units are compared that the plan gives equal work: first stages, or last, or both, or neither, whose products
of a microbatch are within EQUAL of each other, whichever specialist they belong to. A unit is a straggler when in each
of STEPS steps in a row it was the slowest of its equals, and its seconds of computing (data, forward, loss, backward,
optimizer: no phase that waits for other units) per token were 1 / SCORE of the median of the others or more.

SCORE is the relative performance below which nvidia-resiliency-ext reports a GPU. Were all k >= 2 equals alike, one of
them would be the slowest of STEPS steps in a row with a chance of k^(1 - STEPS) <= 2e-6, and by that much with less.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ultrafuser_mega.planning.cost import rank_cost
from ultrafuser_mega.planning.microbatch import Microbatch
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.planning.roles import role_of

SCORE = 0.7
STEPS = 20
EQUAL = 0.05
_ALIKE = (1000, 750)  # tokens and response tokens of the microbatch by which work is compared


class Stragglers:
    """Looks at every step of a run; names each unit once.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._equals = [units for units in equal_units(plan) if len(units) > 1]
        self._streaks: dict[tuple[int, ...], list[float]] = {}
        self._named: set[tuple[int, ...]] = set()

    def step(self, computing: np.ndarray, tokens: Mapping[str, int]) -> str | None:
        """A line for people when a straggler shows for the first time.

        Args:
            computing: (ranks,) seconds that each computed in a step.
            tokens: specialist -> its tokens in that step.
        """
        specialists = self._plan.layout.specialists_on
        found = None
        for units in self._equals:
            fed = [sum(tokens[name] for name in specialists(unit[0])) for unit in units]
            seconds = [float(computing[list(unit)].max()) / count for unit, count in zip(units, fed, strict=True)]
            slowest = int(np.argmax(seconds))
            others = float(np.median(seconds[:slowest] + seconds[slowest + 1 :]))
            ratio = seconds[slowest] / others
            for place, unit in enumerate(units):
                if place != slowest or ratio * SCORE < 1:
                    self._streaks.pop(unit, None)
                    continue
                streak = self._streaks.setdefault(unit, [])
                if unit not in self._named:
                    streak.append(ratio)
                if len(streak) == STEPS:
                    self._named.add(unit)
                    found = self._line(unit, len(units) - 1, float(np.mean(streak)))
                    streak.clear()
        return found

    def _line(self, unit: tuple[int, ...], others: int, ratio: float) -> str:
        names = ", ".join(self._plan.layout.specialists_on(unit[0]))
        who = f"rank {unit[0]}" if len(unit) == 1 else f"ranks {unit[0]}-{unit[-1]}"
        than = "the one other with" if others == 1 else f"the median of {others} others with"
        return f"straggler: {who} ({names}) took {ratio:.2g} times as long as {than} equal work, {STEPS} steps in a row"


def equal_units(plan: RunPlan) -> list[list[tuple[int, ...]]]:
    """Tensor-parallel groups of ranks, in lists of those that have equal work in the last stage that the run has."""
    if not plan.config.stages:
        return []
    groups = {tuple(group) for name in plan.architectures for group in plan.layout.tensor_groups(name)}
    alike, last_stage = Microbatch.alike(list(plan.architectures), *_ALIKE), max(plan.config.stages)
    work: dict[tuple[int, ...], tuple[bool, bool, float]] = {}
    for unit in groups:
        rank = unit[0] % plan.layout.replica_size
        role, products = role_of(plan, rank), rank_cost(plan, rank, alike, stage=last_stage).products
        work[unit] = (role.is_first, role.is_last, sum(products.values()))
    found: list[list[tuple[int, ...]]] = []
    for unit in sorted(groups, key=lambda unit: (work[unit], unit)):
        first, last, least = work[found[-1][0]] if found else (False, False, 0.0)
        if work[unit][:2] == (first, last) and work[unit][2] <= least * (1 + EQUAL):
            found[-1].append(unit)
        else:
            found.append([unit])
    return found
