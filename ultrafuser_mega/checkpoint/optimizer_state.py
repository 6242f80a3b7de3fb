"""What a rank's optimizer holds of each parameter that it updates, as checkpoints know it.

Of every parameter that trains: ``exp_avg`` and ``exp_avg_sq``, and ``param``, its float32 weight, where the model's is
narrower. With the distributed optimizer a rank holds a run of the elements of a flattened parameter, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from ultrafuser_mega.runtime.trainable import Trainable

#: Parameter -> kind -> (elements of what is flattened, float32; the first one's place)
States = Mapping[nn.Parameter, Mapping[str, tuple[Tensor, int]]]


def own_states(trainable: Trainable) -> States:
    """All that this rank's optimizer holds; the tensors are its own."""
    return {parameter: _own(trainable, parameter) for parameter in _owned(trainable)}


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


def _own(trainable: Trainable, parameter: nn.Parameter) -> dict[str, tuple[Tensor, int]]:
    main, state = _updated(trainable, parameter)
    first = trainable.owned(parameter).start or 0
    kinds = ("exp_avg", "exp_avg_sq") if parameter.dtype == torch.float32 else ("param", "exp_avg", "exp_avg_sq")
    return {kind: ((main if kind == "param" else state[kind]).detach().view(-1), first) for kind in kinds}


def _inner(trainable: Trainable) -> Any:
    return trainable.optimizer.chained_optimizers[0]


def _owned(trainable: Trainable) -> list[nn.Parameter]:
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
