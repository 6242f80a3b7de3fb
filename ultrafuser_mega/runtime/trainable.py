"""A module being trained: its gradients, its optimizer, its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.shared_rows import counted_again
from ultrafuser_mega.runtime.weight_gather import WeightGather


class Rates(NamedTuple):
    """Learning rates of a step: of everything, and the gate's, which may be another."""

    lr: float
    gate_lr: float


@dataclass(frozen=True)
class Trainable:
    """A module being trained on this rank: gradients over replicas, one optimizer, one schedule.

    clip_grad: bound on the gradient norm; 0 for none.
    phases: of this rank; sums of gradients over replicas are one, the wait for all ranks' norms another.
    gather: of updated weights from replicas, where the forward hides it.
    """

    wrapped: DistributedDataParallel
    optimizer: ChainedOptimizer
    schedule: OptimizerParamScheduler
    clip_grad: float
    device: torch.device
    phases: Phases
    gather: WeightGather | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """This rank's parameters that are being trained."""
        return [p for p in self.wrapped.module.parameters() if p.requires_grad]

    def owned(self, parameter: nn.Parameter) -> slice:
        """Which elements of a flattened parameter this rank updates: with the distributed optimizer a part, or none."""
        inner = self.optimizer.chained_optimizers[0]
        if not isinstance(inner, DistributedOptimizer):
            return slice(None)
        if parameter not in inner.model_param_group_index_map:
            return slice(0)
        part = inner._get_model_param_range_map(parameter)["param"]
        return slice(part.start, part.end)

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
        rates = self._rates()
        if not skip:
            with megatron_scope(self.device):
                self.optimizer.step_with_ready_grads()
                if self.gather is not None:
                    self.gather.start()
        self.schedule.step(1)
        return rates

    def _rates(self) -> Rates:
        # Every rank has all groups, those without parameters of its own too; only a gate's rate is not the default.
        found = {group["default_config"]: float(group["lr"]) for group in self.optimizer.param_groups}
        lr = found.get(True, 0.0)
        return Rates(lr, found.get(False, lr))

    def settle(self) -> None:
        """Until this rank's weights are all as the last update left them, for who reads them without a forward."""
        if self.gather is not None:
            self.gather.wait()

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
