"""A module being trained: its gradients, its optimizer, its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ultrafuser_mega.runtime.mcore import megatron_scope


@dataclass(frozen=True)
class Trainable:
    """A module being trained on this rank: gradients over replicas, one optimizer, one schedule."""

    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    device: torch.device

    def zero_grad(self) -> None:
        """Clear gradients before a step."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def reduce_gradients(self) -> None:
        """Sum gradients over replicas, for a backward that ran outside Megatron's schedule."""
        with megatron_scope(self.device):
            self.wrapped.finish_grad_sync()

    def step(self) -> tuple[float, float]:
        """Clip by the one global norm, update, advance the schedule; returns (gradient norm, lr used)."""
        lr = self.optimizer.param_groups[0]["lr"] if self.optimizer.param_groups else 0.0
        with megatron_scope(self.device):
            _, norm, _ = self.optimizer.step()
            if norm is None:  # clipping is off
                norm = self.optimizer.get_grad_norm()
        self.schedule.step(1)
        return float(norm), float(lr)
