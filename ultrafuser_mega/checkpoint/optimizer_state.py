"""What a rank's optimizer holds of each parameter that it updates, as checkpoints know it.

Of every parameter that trains: ``exp_avg`` and ``exp_avg_sq``, and ``param``, its float32 weight, where the model's is
narrower. With the distributed optimizer a rank holds a run of the elements of a flattened parameter, or none; in host
memory such runs are cut further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ultrafuser_mega.runtime.host_states import Runs
from ultrafuser_mega.runtime.trainable import Trainable, updated

#: Parameter -> what is held of it
States = Mapping[nn.Parameter, Runs]


def own_states(trainable: Trainable) -> States:
    """All that this rank's optimizer holds; the tensors are its own."""
    own = _own if trainable.host is None else _in_host_memory
    return {parameter: own(trainable, parameter) for parameter in _owned(trainable)}


def create_moments(trainable: Trainable, steps: int) -> None:
    """What AdamW would hold after ``steps`` steps, with zero moments, so that a checkpoint can be read into it."""
    if trainable.host is not None:
        trainable.host.steps = steps  # its moments are there from the beginning
        return
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


def _own(trainable: Trainable, parameter: nn.Parameter) -> Runs:
    main, state = _updated(trainable, parameter)
    first = trainable.owned(parameter).start or 0
    kinds = ("exp_avg", "exp_avg_sq") if parameter.dtype == torch.float32 else ("param", "exp_avg", "exp_avg_sq")
    return {kind: [((main if kind == "param" else state[kind]).detach().view(-1), first)] for kind in kinds}


def _in_host_memory(trainable: Trainable, parameter: nn.Parameter) -> Runs:
    assert trainable.host is not None
    runs = trainable.host.runs(parameter)
    return {kind: runs[kind] for kind in ("param", "exp_avg", "exp_avg_sq") if kind in runs}


def _inner(trainable: Trainable) -> Any:
    return trainable.optimizer.chained_optimizers[0]


def _owned(trainable: Trainable) -> list[nn.Parameter]:
    return [parameter for parameter in trainable.parameters if trainable.owned(parameter) != slice(0)]


def _updated(trainable: Trainable, parameter: nn.Parameter) -> tuple[Tensor, dict[str, Tensor]]:
    """The tensor that the optimizer updates for a model parameter, and its state."""
    main = updated(trainable.optimizer, parameter)
    return main, _inner(trainable).optimizer.state[main]
