"""Which rank does what: from a layout's sizes to ranks, without any process group.

Vocabulary, used everywhere in the package:

- a *specialist* has its own tensor-parallel size ``tp`` and pipeline-parallel size ``pp``;
- a *replica* is one whole fused model; there are ``dp`` of them, each on consecutive ranks, so that on
  a cluster the traffic between specialists stays inside a node where it can;
- inside a replica a specialist occupies ``tp * pp`` consecutive ranks, tensor-parallel rank fastest;
- the *fusion group* of a replica is the union of all specialists' last-stage ranks: the vocabulary rows
  of all heads are sharded evenly over it, and it is where the mixture loss is computed.

``disjoint``: every specialist on its own ranks. ``colocated``: all specialists on the same ranks, with one
common tp and pp. Nothing else is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

from ultrafuser_mega.errors import InputError


@dataclass(frozen=True)
class Placement:
    """A specialist's sizes and the first rank of each replica's block (counted from the replica's start)."""

    tp: int
    pp: int
    first_rank: int

    @property
    def ranks(self) -> range:
        """Ranks inside a replica, counted from the replica's start."""
        return range(self.first_rank, self.first_rank + self.tp * self.pp)

    @property
    def last_stage(self) -> range:
        """The last pipeline stage's ranks inside a replica."""
        return self.ranks[-self.tp :]


@dataclass(frozen=True)
class LayoutPlan:
    """A resolved layout over ``world_size`` ranks; pure arithmetic, the same on every rank."""

    kind: Literal["disjoint", "colocated"]
    placements: Mapping[str, Placement]
    dp: int

    @cached_property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return max(p.ranks.stop for p in self.placements.values())

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.replica_size * self.dp

    @property
    def fusion_size(self) -> int:
        """Ranks of one fusion group."""
        return len(self._fusion_in_replica)

    @cached_property
    def _fusion_in_replica(self) -> list[int]:
        return sorted({rank for p in self.placements.values() for rank in p.last_stage})

    def replica_of(self, rank: int) -> int:
        """The data-parallel replica that ``rank`` belongs to."""
        return rank // self.replica_size

    def specialists_on(self, rank: int) -> list[str]:
        """Names of the specialists that have a stage on ``rank``, in configuration order."""
        local = rank % self.replica_size
        return [name for name, p in self.placements.items() if local in p.ranks]

    def tensor_groups(self, name: str) -> list[list[int]]:
        """Tensor-parallel groups of a specialist, one per (replica, stage)."""
        p = self.placements[name]
        stages = [list(p.ranks[stage * p.tp : (stage + 1) * p.tp]) for stage in range(p.pp)]
        return self._in_every_replica(stages)

    def pipeline_groups(self, name: str) -> list[list[int]]:
        """Pipeline-parallel groups of a specialist, one per (replica, tensor-parallel rank)."""
        p = self.placements[name]
        return self._in_every_replica([list(p.ranks[t :: p.tp]) for t in range(p.tp)])

    def data_groups(self) -> list[list[int]]:
        """Data-parallel groups: the ranks at the same place of every replica."""
        return [list(range(local, self.world_size, self.replica_size)) for local in range(self.replica_size)]

    def replica_groups(self) -> list[list[int]]:
        """All ranks of each replica."""
        return self._in_every_replica([list(range(self.replica_size))])

    def fusion_groups(self) -> list[list[int]]:
        """The fusion group of each replica."""
        return self._in_every_replica([self._fusion_in_replica])

    def _in_every_replica(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        firsts = range(0, self.world_size, self.replica_size)
        return [[first + rank for rank in ranks] for first in firsts for ranks in groups]

    def describe(self) -> str:
        """One line for people: ``disjoint: text tp=2 (0-1), code tp=2 (2-3), math tp=2 pp=2 (4-7)``."""
        if self.kind == "colocated":
            p = next(iter(self.placements.values()))
            sizes = f"{', '.join(self.placements)} all on tp={p.tp} pp={p.pp}"
        else:
            parts = []
            for name, p in self.placements.items():
                span = f"{p.ranks.start}" if len(p.ranks) == 1 else f"{p.ranks.start}-{p.ranks.stop - 1}"
                parts.append(
                    f"{name} tp={p.tp}"
                    + (f" pp={p.pp}" if p.pp > 1 else "")
                    + f" ({'rank' if len(p.ranks) == 1 else 'ranks'} {span})"
                )
            sizes = ", ".join(parts)
        return f"{self.kind}: {sizes}" + (f", dp={self.dp}" if self.dp > 1 else "")


def plan_disjoint(sizes: Mapping[str, tuple[int, int, int | None]], dp: int) -> LayoutPlan:
    """Place every specialist on its own ranks.

    Args:
        sizes: name -> (tp, pp, first rank inside the replica or None for "after the previous one").
        dp: number of replicas.

    Raises:
        InputError: two specialists share a rank, or ranks of the replica stay without work.
    """
    placements: dict[str, Placement] = {}
    following = 0
    for name, (tp, pp, first_rank) in sizes.items():
        placement = Placement(tp, pp, following if first_rank is None else first_rank)
        placements[name] = placement
        following = placement.ranks.stop
    for (a, pa), (b, pb) in combinations(placements.items(), 2):
        clash = sorted(set(pa.ranks) & set(pb.ranks))
        if clash:
            raise InputError(
                f"specialists {a} and {b} both want rank(s) {', '.join(map(str, clash))}; "
                "give them disjoint first_rank values, or use kind: colocated with one tp and pp for all"
            )
    used = {rank for p in placements.values() for rank in p.ranks}
    idle = sorted(set(range(max(used) + 1)) - used)
    if idle:
        raise InputError(f"rank(s) {', '.join(map(str, idle))} have no specialist; close the gap in first_rank")
    return LayoutPlan("disjoint", placements, dp)


def plan_colocated(names: Sequence[str], tp: int, pp: int, dp: int) -> LayoutPlan:
    """Place all specialists on the same ``tp * pp`` ranks of each replica."""
    return LayoutPlan("colocated", dict.fromkeys(names, Placement(tp, pp, 0)), dp)


def plan_that_fits(plans: Sequence[LayoutPlan], ranks: int) -> LayoutPlan:
    """The first plan that needs exactly ``ranks``, else the first that leaves some of them without work.

    Raises:
        InputError: all need more.
    """
    if fitting := [plan for plan in plans if plan.world_size <= ranks]:
        return max(fitting, key=lambda plan: plan.world_size == ranks)
    least = min(plan.world_size for plan in plans)
    raise InputError(
        f"layouts: {ranks} rank(s) are left, and all of the layouts use more; add one for {ranks} or fewer, "
        f"or wait for {least}"
    )


def choose_plan(plans: Sequence[LayoutPlan], world_size: int) -> LayoutPlan:
    """The first plan that needs exactly ``world_size`` ranks.

    Raises:
        InputError: none does; the message lists the rank counts that would work.
    """
    for plan in plans:
        if plan.world_size == world_size:
            return plan
    counts = sorted({plan.world_size for plan in plans})
    raise InputError(
        f"layouts: none of the configured layouts uses {world_size} rank(s); "
        f"launch with {' or '.join(map(str, counts))}, or add a layout for {world_size}"
    )
