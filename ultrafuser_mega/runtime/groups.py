"""From a layout plan to process groups, made explicitly and passed explicitly.

Every rank of the job calls :func:`make_groups` once, in the same order as all others (creating a process
group is collective over the world). Nothing in the package reads Megatron's global ``parallel_state``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from ultrafuser_mega.runtime.layout import LayoutPlan


@dataclass(frozen=True)
class RankGroups:
    """The process groups one rank takes part in.

    Attributes:
        rank: global rank.
        plan: the layout all of this came from.
        megatron: tp, pp, dp, ... of the specialist(s) on this rank, as Megatron-core wants them.
        fusion: the replica's fusion group; None unless this rank is on a last stage.
        replica: all ranks of this rank's replica.
        data: the ranks at the same place of every replica.
        world: all ranks.
    """

    rank: int
    plan: LayoutPlan
    megatron: ProcessGroupCollection
    fusion: dist.ProcessGroup | None
    replica: dist.ProcessGroup
    data: dist.ProcessGroup
    world: dist.ProcessGroup

    @property
    def local_specialists(self) -> list[str]:
        """Specialists with a stage on this rank."""
        return self.plan.specialists_on(self.rank)

    @property
    def replica_index(self) -> int:
        """Index of this rank's data-parallel replica."""
        return self.plan.replica_of(self.rank)

    @property
    def reads(self) -> bool:
        """Whether this rank is of the first replica, which alone reads weights (:meth:`receive`)."""
        return self.replica_index == 0

    def receive(self, tensors: Iterable[Tensor]) -> None:
        """Make ``tensors`` those of this rank's place in the first replica; collective over ``data``."""
        if self.data.size() > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), group=self.data, group_src=0)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank takes part in the fusion group."""
        return self.fusion is not None

    @property
    def is_reporter(self) -> bool:
        """Whether this rank stands for its replica when losses are added up (one rank per replica)."""
        return self.fusion is not None and self.fusion.rank() == 0


def make_groups(plan: LayoutPlan) -> RankGroups:
    """Create every group of ``plan``; collective over the world, which must have ``plan.world_size`` ranks."""
    rank = dist.get_rank()
    if dist.get_world_size() != plan.world_size:
        raise ValueError(f"the plan needs {plan.world_size} ranks, the job has {dist.get_world_size()}")
    # Colocated specialists share all their groups, so the first stands for all.
    names = list(plan.placements)[:1] if plan.kind == "colocated" else list(plan.placements)
    tensor, pipeline = None, None
    for name in names:
        tensor = _mine(plan.tensor_groups(name), f"tp {name}") or tensor
        pipeline = _mine(plan.pipeline_groups(name), f"pp {name}") or pipeline
    data = _mine(plan.data_groups(), "dp")
    replica = _mine(plan.replica_groups(), "replica")
    fusion = _mine(plan.fusion_groups(), "fusion")
    alone = _mine([[r] for r in range(plan.world_size)], "cp")
    world = dist.group.WORLD
    assert tensor and pipeline and data and replica and alone and world  # every rank is in one of each
    megatron = ProcessGroupCollection(
        tp=tensor,
        pp=pipeline,
        cp=alone,
        dp=data,
        dp_cp=data,
        tp_cp=tensor,
        # One gradient norm over all specialists, heads and gate: Megatron sums the squared norms over `mp`
        # (plain optimizer) or over `intra_dist_opt` (distributed optimizer, whose gradients are dp shards).
        mp=replica,
        intra_dist_opt=world,
        intra_dp_cp=data,
        inter_dist_opt=None,
        # No experts, no tied embeddings.
        ep=alone,
        expt_tp=tensor,
        expt_dp=data,
        intra_expt_dp=data,
        tp_ep_pp=replica,
        embd=None,
        pos_embd=None,
    )
    return RankGroups(rank, plan, megatron, fusion, replica, data, world)


def _mine(enumeration: list[list[int]], description: str) -> dist.ProcessGroup | None:
    mine, _ = dist.new_subgroups_by_enumeration(enumeration, group_desc=description)
    return mine
