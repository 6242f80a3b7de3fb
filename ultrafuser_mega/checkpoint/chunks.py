"""What a rank holds of a checkpoint's tensors, cut into rectangles, so that nobody gathers anything to save it.

A checkpoint holds whole tensors, whatever the layout. A rank's parameter is one or more :class:`Part`s of them: whole
rows, or columns of all rows. With the distributed optimizer a replica updates an arbitrary run of the elements of a
flattened parameter; in the whole tensor that is at most three rectangles (the rest of a row, whole rows, the beginning
of a row). Replicas that hold the same write an equal share of it each.

    specialists.<name>.<Megatron name>    heads.<name>    tails.<name>    gate.<...>
    optimizer.<param|exp_avg|exp_avg_sq>.<name of the parameter>
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn

from ultrafuser_mega.checkpoint.optimizer_state import own_states
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.trainable import Trainable


@dataclass(frozen=True)
class Chunk:
    """A rectangle of one of the checkpoint's tensors.

    key      name of the tensor
    shape    of the whole tensor
    offsets  of the rectangle in it
    data     the rectangle's numbers, as many dimensions as ``shape``
    padded   whether the whole tensor's rows end in padding that depends on the layout
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: Tensor
    padded: bool


@dataclass(frozen=True)
class Part:
    """Elements ``first`` .. of a flattened parameter that are one rectangle (rows, columns) of a checkpoint's tensor.

    key, shape, padded  as of :class:`Chunk`
    offsets             of the rectangle
    size                the rectangle's: (rows,) or (rows, columns); the tensor's dimensions before are of size 1
    is_copy             another rank of the same replica writes it
    """

    key: str
    shape: tuple[int, ...]
    padded: bool
    offsets: tuple[int, ...]
    first: int
    size: tuple[int, ...]
    is_copy: bool

    def share(self, replica: int, replicas: int) -> range:
        """The elements of the parameter that one of ``replicas`` that hold all of them writes: whole rows."""
        rows, width = self.size[0], math.prod(self.size[1:])
        begin, end = (rows * at // replicas * width for at in (replica, replica + 1))
        return range(self.first + begin, self.first + end)

    def chunks(self, prefix: str, run: Tensor, first: int) -> Iterator[Chunk]:
        """Of a run of elements of the flattened parameter, which begins at ``first``, those that are of this part."""
        begin = max(self.first, first)
        end = min(self.first + math.prod(self.size), first + run.numel())
        if begin >= end:
            return
        leading = len(self.shape) - len(self.size)
        for row, column, rows, columns in _rectangles(begin - self.first, end - self.first, math.prod(self.size[1:])):
            start = self.first + row * math.prod(self.size[1:]) + column - first
            place, size = (row, column)[: len(self.size)], (rows, columns)[: len(self.size)]
            inner = [at + by for at, by in zip(self.offsets[leading:], place, strict=True)]
            yield Chunk(
                prefix + self.key,
                self.shape,
                (*self.offsets[:leading], *inner),
                run[start : start + rows * columns].view(*[1] * leading, *size),
                self.padded,
            )


def _rectangles(begin: int, end: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Elements ``begin`` to ``end`` of a flattened matrix as (row, column, rows, columns)."""
    row, column = divmod(begin, width)
    if column:
        columns = min(width - column, end - begin)
        yield row, column, 1, columns
        begin, row = begin + columns, row + 1
    if whole := (end - begin) // width:
        yield row, 0, whole, width
    if rest := (end - begin) % width:
        yield row + whole, 0, 1, rest


def chunks_to_write(model: FusedStage, trainable: Trainable | None, groups: RankGroups) -> list[Chunk]:
    """What this rank writes: of weights, and of what every replica holds of the optimizer, its replica's share.

    Args:
        model: this rank's share.
        trainable: whose optimizer to write too; None for weights alone.
        groups: this rank's process groups.
    """
    if trainable is not None:
        trainable.settle()
    found: list[Chunk] = []
    states = {} if trainable is None else own_states(trainable)
    replica, replicas = groups.replica_index, groups.plan.dp
    for parameter, parts in parameter_parts(model, groups):
        for part in parts:
            if part.is_copy:
                continue
            share = part.share(replica, replicas)
            found += part.chunks("", _run(parameter)[share.start : share.stop], share.start)
            if trainable is None or trainable.owned(parameter) != slice(None):  # else every replica holds all of it
                share = range(parameter.numel())
            for kind, runs in states.get(parameter, {}).items():
                for run, first in runs:
                    begin = max(first, share.start)
                    own = run[begin - first : max(begin, share.stop) - first]
                    found += part.chunks(f"optimizer.{kind}.", own, begin)
    return found


def weights_to_read(model: FusedStage, groups: RankGroups) -> list[Chunk]:
    """All of this rank's weights, to be read into."""
    found = parameter_parts(model, groups)
    return [chunk for parameter, parts in found for part in parts for chunk in part.chunks("", _run(parameter), 0)]


def states_to_read(model: FusedStage, trainable: Trainable, groups: RankGroups) -> list[Chunk]:
    """What this rank's optimizer holds, to be read into."""
    states = own_states(trainable)
    return [
        chunk
        for parameter, parts in parameter_parts(model, groups)
        for kind, runs in states.get(parameter, {}).items()
        for run, first in runs
        for part in parts
        for chunk in part.chunks(f"optimizer.{kind}.", run, first)
    ]


def parameter_parts(model: FusedStage, groups: RankGroups) -> list[tuple[nn.Parameter, list[Part]]]:
    """Where each of this rank's parameters lies in the checkpoint's tensors."""
    with megatron_scope(next(model.parameters()).device), torch.no_grad():
        return [(shard.data, _parts_of(shard)) for shard in described(model, groups).values()]


def described(model: FusedStage, groups: RankGroups) -> Mapping[str, Any]:
    """Flat name -> Megatron's ShardedTensor (or factory of several) of everything this rank holds of the model."""
    state: dict[str, Any] = {}
    metadata = {"dp_cp_group": groups.data}
    for name, stage in model.stages.items():
        shards = stage.sharded_state_dict(prefix=f"specialists.{name}.", metadata=metadata)
        state |= {key: shard for key, shard in shards.items() if isinstance(getattr(shard, "data", None), Tensor)}
    if model.fusion is not None:
        state |= model.fusion.sharded_state_dict(groups.replica_index)
    return state


def _parts_of(shard: ShardedTensor | ShardedTensorFactory) -> list[Part]:
    pieces: Sequence[ShardedTensor] = [shard]
    if isinstance(shard, ShardedTensorFactory):
        pieces = shard.build_fn(shard.key, shard.data, shard.replica_id, None)
    start = shard.data.storage_offset()
    parts = []
    for piece in pieces:
        *copies, _ = piece.replica_id  # the last is the replica, which the others know nothing of
        assert piece.data.is_contiguous() and piece.data.untyped_storage()._cdata == shard.data.untyped_storage()._cdata
        parts.append(
            Part(
                piece.key,
                tuple(piece.global_shape),
                piece.allow_shape_mismatch,
                tuple(piece.global_offset),
                piece.data.storage_offset() - start,
                tuple(piece.data.shape),
                any(copies),
            )
        )
    return parts


def _run(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().view(-1)
