"""Drives Megatron-core's own schedules over the fused model's microbatches.

The exchange and the loss live inside the last stages' loss function, so the schedules run unchanged. Only
last stages meet in the fusion group: earlier stages run ahead of each other under 1F1B.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ultrafuser_mega.data.packing import PackedTokens
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.models.weight_gradients import accumulated_weight_gradients
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.phases import Phases


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


class _Feed(Generic[B]):
    """The microbatches of one run of a schedule, on the device, the next of them open to a look ahead."""

    def __init__(self, microbatches: Iterable[B], device: torch.device) -> None:
        self._left = iter(microbatches)
        self._ahead: deque[B] = deque()
        self._device = device

    def look_ahead(self) -> B:
        """The first microbatch that was neither taken nor looked at."""
        batch: B = next(self._left).to(self._device)
        self._ahead.append(batch)
        return batch

    def __next__(self) -> B:
        return self._ahead.popleft() if self._ahead else next(self._left).to(self._device)


class KnownShapes(P2PCommunicator):
    """Pipeline transfers whose shapes both sides know from the microbatches: nothing is exchanged to agree on them.

    Megatron sends three numbers before every tensor of variable length, in a batch of its own that can deadlock from
    four stages on (Megatron-LM #5100, #5271), and waits for the device to read them. Here what comes from the previous
    stage belongs to its next microbatch, and the gradient that comes back to the oldest tensor sent and not answered.
    """

    def __init__(self, group: dist.ProcessGroup, config: TransformerConfig, phases: Phases) -> None:
        super().__init__(group, config)
        self._phases = phases
        self.next_size: Callable[[], int] = lambda: 0  # numbers of the next tensor from the previous stage
        self._sent: deque[Sequence[int]] = deque()

    def _communicate(self, **transfer: Any) -> Any:
        with self._phases("pipeline transfer"):
            return super()._communicate(**transfer)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Sequence[int], Sequence[int]]:
        if tensor_send_next is not None:
            self._sent.append(tensor_send_next.shape)
        nothing = (0, 0, 0)
        return (self.next_size(), 1, 1) if recv_prev else nothing, self._sent.popleft() if recv_next else nothing

    def begin(self, next_size: Callable[[], int]) -> None:
        """Before a run of a schedule; of the run before nothing is awaited."""
        self._sent.clear()
        self.next_size = next_size


class Engine:
    """Runs microbatches through the pipeline of this rank's specialist(s).

    Args:
        model: this rank's share of the fused model.
        groups: its process groups.
        device: where it computes.
        phases: of this rank.
    """

    def __init__(
        self, model: FusedStage, groups: RankGroups, device: torch.device, phases: Phases | None = None
    ) -> None:
        self.model = model
        self.phases = phases or Phases()
        self.groups = groups
        self.device = device
        config = model.config
        pipelined = groups.megatron.pp.size() > 1
        self._p2p = KnownShapes(groups.megatron.pp, config, self.phases) if pipelined else None
        self._schedule = (
            schedules.forward_backward_pipelining_without_interleaving
            if pipelined
            else schedules.forward_backward_no_pipelining
        )

    def train(self, wrapped: DistributedDataParallel, microbatches: Batches[B], loss: LossFunction[B]) -> None:
        """Forward and backward of everything; gradients end up reduced in ``wrapped``'s buffers.

        ``loss`` must return its microbatch's share of the global batch's loss: gradients are only summed.
        """
        with self.phases("backward"):  # but for the phases inside it
            self._run(wrapped, microbatches, loss, forward_only=False)

    def forward(self, microbatches: Batches[B], loss: LossFunction[B]) -> None:
        """Forward only, with the specialists under no_grad; ``loss`` may run a backward of its own."""
        self._run(self.model, microbatches, loss, forward_only=True)

    def _run(self, model: Any, microbatches: Batches[B], loss: LossFunction[B], forward_only: bool) -> None:
        if len(microbatches) == 0:  # Megatron's schedules run at least one
            return

        feed, uncounted = _Feed(microbatches, self.device), torch.zeros((), dtype=torch.int)
        if self._p2p is not None:
            self._p2p.begin(lambda: self.model.handed_over(feed.look_ahead().tokens))

        def loss_of(hidden: Any, batch: B) -> tuple[Tensor, Tensor, dict[str, Any]]:
            with names_as_they_are():
                return loss(hidden, batch), uncounted, {}

        def forward_step(
            batches: Any, stage: Any
        ) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, dict[str, Any]]]]:
            batch = next(batches)
            with names_as_they_are(), torch.set_grad_enabled(not forward_only):
                output = stage(batch.tokens, batch.rows)
            # Megatron would count tokens (the number between) to divide the gradients in the end.
            return output, lambda hidden: loss_of(hidden, batch)

        with megatron_scope(self.device) as names_as_they_are, accumulated_weight_gradients(self.device):
            self._schedule(
                forward_step_func=forward_step,
                data_iterator=feed,
                model=[model],
                num_microbatches=len(microbatches),
                seq_length=1,  # unused with variable lengths
                micro_batch_size=1,  # likewise
                forward_only=forward_only,
                pg_collection=self.groups.megatron,
                **({"p2p_communicator": self._p2p} if self._p2p is not None else {}),
            )
