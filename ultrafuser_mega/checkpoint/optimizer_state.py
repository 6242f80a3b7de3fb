"""The optimizer's tensors in the shape of the model's parameters, as checkpoints hold them whatever the layout.

Of every parameter that trains: ``exp_avg`` and ``exp_avg_sq``, and ``param``, its float32 weight, where the model's is
narrower. With the distributed optimizer every replica holds a part of them. The first replica, which alone writes,
receives the others' parts one by one and puts them together in host memory: the device holds one part at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.trainable import Trainable

#: Parameter -> kind -> tensor of its shape
States = Mapping[nn.Parameter, Mapping[str, Tensor]]


def states_to_write(trainable: Trainable, groups: RankGroups) -> States:
    """What this rank writes: on the first replica everything of its parameters; collective over ``groups.data``."""
    inner = _inner(trainable)
    if not isinstance(inner, DistributedOptimizer):
        return {parameter: _own(trainable, parameter) for parameter in trainable.parameters}
    if groups.data.size() == 1:
        return {
            parameter: {kind: tensor.view(parameter.shape) for kind, tensor in _own(trainable, parameter).items()}
            for parameter in trainable.parameters
        }
    found = _room(trainable) if groups.reads else {}
    for parameter in trainable.parameters:
        mine = _own(trainable, parameter) if trainable.owned(parameter) != slice(0) else {}
        for replica, part in _parts(inner, parameter, groups.data.size()):
            for kind in _kinds(parameter):
                piece = _on_the_first(mine.get(kind), part, replica, groups, trainable.device)
                if piece is not None:
                    found[parameter][kind].view(-1)[part] = piece
    return found


def _on_the_first(
    mine: Tensor | None, part: slice, replica: int, groups: RankGroups, device: torch.device
) -> Tensor | None:
    """The part that ``replica`` has, in the first replica's host memory; None on the others."""
    if replica == groups.data.rank():
        assert mine is not None
        if groups.reads:
            return mine.detach().to("cpu")
        dist.send(mine.detach().contiguous(), group=groups.data, group_dst=0)
    elif groups.reads:
        piece = torch.empty(part.stop - part.start, dtype=torch.float32, device=device)
        dist.recv(piece, group=groups.data, group_src=replica)
        return piece.to("cpu")
    return None


def states_to_read(trainable: Trainable) -> States:
    """Tensors to read into: the optimizer's own where they are whole, else room in host memory."""
    if isinstance(_inner(trainable), DistributedOptimizer):
        return _room(trainable)
    return {parameter: _own(trainable, parameter) for parameter in trainable.parameters}


def sharded(states: States, model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> ShardedTensor: "optimizer.<kind>.<parameter's key>", sharded like the parameter in ``model_state``."""
    names = {id(shard.data): key for key, shard in model_state.items()}
    return {
        f"optimizer.{kind}.{names[id(parameter)]}": make_sharded_optimizer_tensor(
            model_state[names[id(parameter)]], tensor, f"optimizer.{kind}"
        )
        for parameter, kinds in states.items()
        for kind, tensor in kinds.items()
    }


def create_moments(trainable: Trainable, steps: int) -> None:
    """What AdamW would hold after ``steps`` steps, with zero moments, so that a checkpoint can be read into it."""
    torch_counts = isinstance(_inner(trainable).optimizer, torch.optim.AdamW)
    if not torch_counts:  # apex and TransformerEngine count steps per parameter group
        for group in _inner(trainable).optimizer.param_groups:
            group["step"] = steps
    for parameter in _owned(trainable):
        main, state = _updated(trainable, parameter)
        if torch_counts:
            state["step"] = torch.tensor(float(steps), device=main.device)  # where the fused kernel counts
        state["exp_avg"] = torch.zeros_like(main.data)
        state["exp_avg_sq"] = torch.zeros_like(main.data)


def restore(trainable: Trainable, loaded: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Fill the optimizer from what a checkpoint held, ``parameters`` being the model's by key."""
    names = {id(parameter): key for key, parameter in parameters.items()}
    for parameter in _owned(trainable):
        part = trainable.owned(parameter)
        for kind, target in _own(trainable, parameter).items():
            source = loaded[f"optimizer.{kind}.{names[id(parameter)]}"]
            target.copy_(source.reshape(-1)[part].view_as(target))


def _inner(trainable: Trainable) -> Any:
    return trainable.optimizer.chained_optimizers[0]


def _owned(trainable: Trainable) -> list[nn.Parameter]:
    """Parameters whose optimizer state, or a part of it, lives on this rank."""
    return [parameter for parameter in trainable.parameters if trainable.owned(parameter) != slice(0)]


def _updated(trainable: Trainable, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
    """The tensor that the optimizer updates for a model parameter (itself, its fp32 copy, or a shard) and its state."""
    inner = _inner(trainable)
    if isinstance(inner, DistributedOptimizer):
        group, order = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][order]
    else:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
    return main, inner.optimizer.state[main]


def _kinds(parameter: nn.Parameter) -> tuple[str, ...]:
    moments = ("exp_avg", "exp_avg_sq")
    return moments if parameter.dtype == torch.float32 else ("param", *moments)


def _own(trainable: Trainable, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Kind -> what this rank holds of it."""
    main, state = _updated(trainable, parameter)
    return {kind: main.data if kind == "param" else state[kind] for kind in _kinds(parameter)}


def _room(trainable: Trainable) -> dict[nn.Parameter, dict[str, Tensor]]:
    return {
        parameter: {kind: torch.empty(parameter.shape, dtype=torch.float32) for kind in _kinds(parameter)}
        for parameter in trainable.parameters
    }


def _parts(inner: DistributedOptimizer, parameter: nn.Parameter, replicas: int) -> Iterator[tuple[int, slice]]:
    """(replica, elements of the flattened parameter that it updates): a bucket is cut evenly, across parameters."""
    buffer = next(buffer for buffer in inner.buffers if parameter in buffer.param_index_map)
    start, stop, bucket = buffer.param_index_map[parameter]
    first, last = buffer.bucket_indices[bucket]
    share = (last - first) // replicas
    for replica in range(replicas):
        begin, end = max(start, first + replica * share), min(stop, first + (replica + 1) * share)
        if begin < end:
            yield replica, slice(begin - start, end - start)
