"""A module being trained: its gradients, its optimizer, its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from ultrafuser_mega.runtime.host_states import HostStates
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.shared_rows import counted_again
from ultrafuser_mega.runtime.weight_gather import WeightGather


class Rates(NamedTuple):
    """Learning rates of a step: the stage's, the gate's (nan: it is frozen), and other parts' that are their own."""

    lr: float
    gate_lr: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Schedules:
    """The rates of a stage: its own, and those of parts that have others.

    stage: of everything else, with ``probe``, a parameter group without parameters that tells its rate.
    parts: name -> the same of a part, of those that are trained and have rates of their own.
    gate: whose rate is the gate's: "" for the stage's own, a part's name; None where it is frozen.
    """

    stage: tuple[OptimizerParamScheduler, Mapping[str, float]]
    parts: Mapping[str, tuple[OptimizerParamScheduler, Mapping[str, float]]] = field(default_factory=dict)
    gate: str | None = ""

    def step(self, steps: int) -> None:
        """Go on by so many steps."""
        for schedule, _ in (self.stage, *self.parts.values()):
            schedule.step(steps)

    @property
    def rates(self) -> Rates:
        """Of the step that comes."""
        own = {name: float(probe["lr"]) for name, (_, probe) in self.parts.items()}
        lr = float(self.stage[1]["lr"])
        gate = math.nan if self.gate is None else own.get(self.gate, lr)
        return Rates(lr, gate, {name: rate for name, rate in own.items() if name != self.gate})


@dataclass(frozen=True)
class Trainable:
    """A module being trained on this rank: gradients over replicas, one optimizer, one schedule.

    clip_grad: bound on the gradient norm; 0 for none.
    phases: of this rank; sums of gradients over replicas are one, the wait for all ranks' norms another.
    gather: of updated weights from replicas, where the forward hides it.
    host: what the optimizer holds, where that is in host memory.
    """

    wrapped: DistributedDataParallel
    optimizer: ChainedOptimizer
    schedule: Schedules
    clip_grad: float
    device: torch.device
    phases: Phases
    gather: WeightGather | None
    host: HostStates | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters that are being trained."""
        return [p for p in self.wrapped.module.parameters() if p.requires_grad]

    def owned(self, parameter: nn.Parameter) -> slice:
        """Which elements of a flattened parameter this rank updates: with the distributed optimizer a part, or none."""
        return owned(self.optimizer, parameter)

    def reload(self) -> None:
        """Take the optimizer's float32 weights, where it has any, from the model's; within ``megatron_scope``."""
        if self.host is not None:
            self.host.reload()
        else:
            self.optimizer.reload_model_params()

    def zero_grad(self) -> None:
        """Clear gradients before a step."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_gradients(self) -> None:
        """Sum gradients over replicas, for a backward that ran outside Megatron's schedule."""
        with self.phases("gradients"), megatron_scope(self.device):
            self.wrapped.finish_grad_sync()

    @torch.no_grad()
    def clip_gradients(self) -> Tensor:
        """Clip by the one global norm; returns it as it was, () on the device, so that nobody has to wait for it."""
        with megatron_scope(self.device):
            self.optimizer.prepare_grads()
            norm = self._gradient_norm()
            if self.clip_grad:
                gradients = [p.grad for p in self.optimizer.get_parameters() if p.grad is not None]
                if gradients:
                    torch._foreach_mul_(gradients, (self.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def update(self, *, skip: bool) -> Rates:
        """Take the step with the clipped gradients, or ``skip`` it: the schedule goes on; returns the step's rates."""
        rates = self.schedule.rates
        if not skip:
            with megatron_scope(self.device):
                if self.host is None:
                    self.optimizer.step_with_ready_grads()
                else:
                    self.host.update()
                    if self.gather is None and self.wrapped.ddp_config.use_distributed_optimizer:
                        self.wrapped.start_param_sync()
                if self.gather is not None:
                    self.gather.start()
        self.schedule.step(1)
        return rates

    def settle(self) -> None:
        """Until weights and optimizer are all as the last update left them, for who reads them without a forward."""
        if self.gather is not None:
            self.gather.wait()
        if self.host is not None:
            self.host.settle()

    def _gradient_norm(self) -> Tensor:
        """Of the whole model. Megatron's own waits for the device once per parameter where apex is missing."""
        squared = torch.zeros((), device=self.device)
        for part in self.optimizer.chained_optimizers:
            if gradients := part.get_main_grads_for_grad_norm():
                squared += torch.stack(torch._foreach_norm(gradients)).square().sum()
        squared -= counted_again(self.parameters, self.owned)
        with self.phases("gradient norm"):
            dist.all_reduce(squared, group=self.optimizer.get_grad_stats_parallel_group())
        return squared.sqrt()


def owned(optimizer: ChainedOptimizer, parameter: nn.Parameter) -> slice:
    """Which elements of a flattened parameter ``optimizer`` updates on this rank; slice(0): none."""
    inner = optimizer.chained_optimizers[0]
    if not isinstance(inner, DistributedOptimizer):
        return slice(None)
    if parameter not in inner.model_param_group_index_map:
        return slice(0)
    part = inner._get_model_param_range_map(parameter)["param"]
    return slice(part.start, part.end)


def updated(optimizer: ChainedOptimizer, parameter: nn.Parameter) -> Tensor:
    """The tensor that ``optimizer`` updates for a model parameter: itself, its float32 copy, or a shard of either."""
    inner = optimizer.chained_optimizers[0]
    if isinstance(inner, DistributedOptimizer):
        group, order = inner.model_param_group_index_map[parameter]
        main: Tensor = inner.optimizer.param_groups[group]["params"][order]
        return main
    main_param: Tensor | None = getattr(parameter, "main_param", None)
    return parameter if main_param is None else main_param
