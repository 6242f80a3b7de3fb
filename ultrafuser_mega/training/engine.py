"""Drives Megatron-core's own schedules over the fused model's microbatches.

The exchange and the loss live inside the last stages' loss function, so the schedules run unchanged. Only
last stages meet in the fusion group: earlier stages run ahead of each other under 1F1B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope


class Batch(Protocol):
    """What the pipeline needs of a microbatch; a loss function may need more of it."""

    @property
    def tokens(self) -> Mapping[str, PackedTokens]:
        """Specialist -> its packed tokens."""

    @property
    def rows(self) -> Mapping[str, Tensor]:
        """Specialist -> (N,) which hidden states predict the response tokens."""

    def to(self, device: torch.device) -> Any:
        """The same on a device."""


B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Batches(Protocol[B_co]):
    """Microbatches, made as they are asked for; their number is known."""

    def __iter__(self) -> Iterator[B_co]: ...

    def __len__(self) -> int: ...


#: (hidden states of this rank's specialists at the rows, the microbatch) -> loss of the microbatch
LossFunction = Callable[[dict[str, Tensor], B], Tensor]


class Engine:
    """Runs microbatches through the pipeline of this rank's specialist(s).

    Args:
        model: this rank's share of the fused model.
        groups: its process groups.
        device: where it computes.
    """

    def __init__(self, model: FusedStage, groups: RankGroups, device: torch.device) -> None:
        self.model = model
        self.groups = groups
        self.device = device
        config = model.config
        pipelined = groups.megatron.pp.size() > 1
        self._p2p = {"p2p_communicator": P2PCommunicator(groups.megatron.pp, config)} if pipelined else {}
        self._schedule = (
            schedules.forward_backward_pipelining_without_interleaving
            if pipelined
            else schedules.forward_backward_no_pipelining
        )

    def train(self, wrapped: DistributedDataParallel, microbatches: Batches[B], loss: LossFunction[B]) -> None:
        """Forward and backward of everything; gradients end up reduced in ``wrapped``'s buffers.

        ``loss`` must return its microbatch's share of the replica's loss times the number of microbatches:
        Megatron divides by it.
        """
        self._run(wrapped, microbatches, loss, forward_only=False)

    def forward(self, microbatches: Batches[B], loss: LossFunction[B]) -> None:
        """Forward only, with the specialists under no_grad; ``loss`` may run a backward of its own."""
        self._run(self.model, microbatches, loss, forward_only=True)

    def _run(self, model: Any, microbatches: Batches[B], loss: LossFunction[B], forward_only: bool) -> None:
        if len(microbatches) == 0:  # Megatron's schedules run at least one
            return

        def forward_step(batches: Any, stage: Any) -> tuple[Any, Callable[[Any], tuple[Tensor, dict[str, Any]]]]:
            batch = next(batches).to(self.device)
            with torch.set_grad_enabled(not forward_only):
                output = stage(batch.tokens, batch.rows)
            # The schedule divides the loss in place, so it gets a tensor of its own.
            return output, lambda hidden: (loss(hidden, batch).clone(), {})

        with megatron_scope(self.device):
            self._schedule(
                forward_step_func=forward_step,
                data_iterator=iter(microbatches),
                model=[model],
                num_microbatches=len(microbatches),
                seq_length=1,  # unused with variable lengths
                micro_batch_size=1,  # likewise
                forward_only=forward_only,
                pg_collection=self.groups.megatron,
                **self._p2p,
            )
