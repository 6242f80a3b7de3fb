"""The batches of a stage, each made in a thread while the step before it runs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import torch

from ultrafuser_mega.data.batches import StepBatch, TrainingBatches


class StepsAhead:
    """Steps ``first`` .. ``stop`` - 1 of ``batches``, to be asked for in this order; what they are is theirs to say.

    A context manager: its thread begins with the first step at once, is never more than a step ahead, and has ended
    when the context is left, however it is.

    Args:
        device: where the batches go; for CUDA they lie in pinned memory.
    """

    def __init__(self, batches: TrainingBatches, first: int, stop: int, device: torch.device) -> None:
        self._batches, self._stop, self._device = batches, stop, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: Future[StepBatch] = self._thread.submit(self._make, first)

    def __enter__(self) -> StepsAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def step(self, step: int) -> StepBatch:
        """The work of a step; raises what making it raised. The next is begun."""
        batch = self._next.result()
        if step + 1 < self._stop:
            self._next = self._thread.submit(self._make, step + 1)
        return batch

    def _make(self, step: int) -> StepBatch:
        batch = self._batches.step(step)
        if self._device.type != "cuda":
            return batch
        return replace(batch, microbatches=[microbatch.pinned() for microbatch in batch.microbatches])
