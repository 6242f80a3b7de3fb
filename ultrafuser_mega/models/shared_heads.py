"""How a checkpoint holds a fused query, key and value projection whose key/value heads several ranks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from ultrafuser_mega.models.families.rules import FusedQKV, LayerSizes


def head_by_head(shard: ShardedTensor, sizes: LayerSizes, group: dist.ProcessGroup) -> ShardedTensorFactory:
    """A rank's weight or bias as heads of the whole one, each at its place.

    The whole has every head once, as where ranks share none, so that any tp reads what any other has written. A key and
    its value head are written by the first of the ranks that share them.

    Args:
        shard: as Megatron describes it, a row of which would be one of a tp times larger number of groups.
        sizes: of the layer.
        group: the tensor-parallel group.
    """
    places = FusedQKV.places(sizes, group.rank(), group.size())
    copy = group.rank() % sizes.kv_copies(group.size())
    layers = shard.prepend_axis_num  # axes in front of the parameter's own: its layer among all

    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: None) -> list[ShardedTensor]:
        heads = []
        for head, place in zip(tensor.split(sizes.head_dim), places, strict=True):
            described = replace(
                shard,
                key=key,
                data=head,
                dtype=head.dtype,
                local_shape=tuple(head.shape),
                global_shape=_with(shard.global_shape, layers, (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim),
                global_offset=_with(shard.global_offset, layers, place * sizes.head_dim),
                axis_fragmentations=_with(shard.axis_fragmentations, layers, sizes.heads + 2 * sizes.kv_heads),
                replica_id=replica_id,
            )
            heads.append(described)
        for pair in heads[-2:]:
            pair.replica_id = (copy, *replica_id[1:])
        return heads

    return ShardedTensorFactory(shard.key, shard.data, build, torch.cat, shard.replica_id)


def _with(sizes: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*sizes[:axis], size, *sizes[axis + 1 :])
