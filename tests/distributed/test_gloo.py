"""Collectives of one group that are on their way at once leave the process as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint.saver import Saver
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import plan_colocated
from ultrafuser_mega.runtime.spawn import run_ranks


def test_every_group_of_a_run_has_one_thread_whose_collectives_come_in_order(tmp_path: Path) -> None:
    assert run_ranks(_threads_of_groups, 2, tmp_path) == [{1}, {1}]


def _threads_of_groups(rank: int, folder: Path) -> set[int]:
    groups = make_groups(plan_colocated(["code"], tp=1, pp=1, dp=2))
    saver = Saver(folder, keep=1, keep_every=0, identity={}, sources=None)
    megatron = [group for group in vars(groups.megatron).values() if isinstance(group, dist.ProcessGroup)]
    assert len(megatron) > 8 and groups.fusion is not None
    found = (groups.world, groups.replica, groups.data, groups.fusion, *megatron, saver._group)
    return {group._get_backend(torch.device("cpu")).options._threads for group in found}


def test_a_saver_has_its_group_beside_a_job_on_gpus(tmp_path: Path) -> None:
    """There groups are asked for a backend of the rank's own GPU, which the job is bound to."""
    run_ranks(_save_beside_gpus, 1, tmp_path)


def _save_beside_gpus(rank: int, folder: Path) -> None:
    world = dist.group.WORLD
    assert world is not None
    world.bound_device_id = torch.device("cuda", 0)  # what a job on GPUs gives
    saver = Saver(folder, keep=1, keep_every=0, identity={}, sources=None)
    world.bound_device_id = None  # there is none for the barrier at the end
    told: list[int | None] = [None]
    dist.all_gather_object(told, rank, group=saver._group)
    assert told == [rank]


@pytest.mark.slow
def test_many_gathers_of_weights_at_once_damage_no_memory() -> None:
    """Of a group with two threads a process dies within some 50,000, now and then of the first 1,000."""
    run_ranks(_gather_many_at_once, 1, 300_000, timeout_s=240.0)


def _gather_many_at_once(rank: int, gathers: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    gloo: Any = group._get_backend(torch.device("cpu"))
    shards, wholes = torch.ones(16, 8), torch.zeros(16, 8)
    for _ in range(gathers // len(shards)):
        # what a coalesced all-gather into a tensor comes to, as Megatron begins one for every bucket
        under_way = [gloo.allgather_coalesced([[w]], [s]) for w, s in zip(wholes, shards, strict=True)]
        for gather in under_way:
            gather.wait()
    assert torch.equal(wholes, shards)
