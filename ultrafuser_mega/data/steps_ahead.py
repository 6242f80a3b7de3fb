"""The batches of a stage, each made in a thread while the step before it runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from ultrafuser_mega.data.batches import StepBatch, Steps


class StepsAhead:
    """Steps ``first`` .. ``stop`` - 1 of ``batches``, to be asked for in this order; what they are is theirs to say.

    A context manager: its thread begins with the first step at once, is never more than a step ahead, and has ended
    when the context is left, however it is.

    Args:
        device: where the batches go; for CUDA they lie in pinned memory.
        waits: whether a step cannot be made before the one before it is done; None: all can.
    """

    def __init__(
        self,
        batches: Steps,
        first: int,
        stop: int,
        device: torch.device,
        waits: Callable[[int], bool] | None = None,
    ) -> None:
        self._batches, self._stop, self._device, self._waits = batches, stop, device, waits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: Future[StepBatch] | None = None
        self._begin(first)

    def __enter__(self) -> StepsAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> StepBatch:
        """The work of a step; raises what making it raised. The next is begun."""
        batch = self._make(step) if self._next is None else self._next.result()
        self._next = None
        if step + 1 < self._stop:
            self._begin(step + 1)
        return batch

    def _begin(self, step: int) -> None:
        if self._waits is None or not self._waits(step):
            self._next = self._thread.submit(self._make, step)

    def _make(self, step: int) -> StepBatch:
        batch = self._batches.step(step)
        if self._device.type != "cuda":
            return batch
        return replace(batch, microbatches=[microbatch.pinned() for microbatch in batch.microbatches])
