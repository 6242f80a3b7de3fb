"""The next step's batch is made in the background; what it is, and when its errors show, does not change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ultrafuser_mega.data.batches import Packing, StepBatch
from ultrafuser_mega.data.collate import MicroBatch
from ultrafuser_mega.data.steps_ahead import StepsAhead

CPU = torch.device("cpu")
PATIENCE_S = 30.0  # of tests that wait for the thread; they end at once unless something is wrong


class Recorded:
    """Batches that say who made them and when; one step may fail."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.made: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.change = threading.Condition()

    def step(self, step: int) -> StepBatch:
        with self.change:
            self.made.append(step)
            self.threads.add(threading.current_thread())
            self.change.notify_all()
        if step == self.failing:
            raise ValueError(f"step {step} cannot be made")
        return StepBatch([], {}, np.array([10 * step]), Packing(0.0, 1.0, 1.0))

    def wait_for(self, steps: list[int]) -> None:
        with self.change:
            assert self.change.wait_for(lambda: self.made == steps, PATIENCE_S), self.made


def ahead_of(batches: Recorded, first: int, stop: int) -> StepsAhead:
    stand_in: Any = batches
    return StepsAhead(stand_in, first, stop, CPU)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_every_step_is_what_the_batches_say_it_is_and_made_once_in_order() -> None:
    batches = Recorded()
    with ahead_of(batches, 3, 8) as ahead:
        assert [ahead.step(step).response_tokens for step in range(3, 8)] == [30, 40, 50, 60, 70]
    assert batches.made == [3, 4, 5, 6, 7]
    assert threading.main_thread() not in batches.threads and len(batches.threads) == 1


def test_one_step_is_made_while_the_one_before_it_runs_and_no_more() -> None:
    batches = Recorded()
    with ahead_of(batches, 0, 3) as ahead:
        batches.wait_for([0])
        ahead.step(0)
        batches.wait_for([0, 1])
        ahead.step(1)
        batches.wait_for([0, 1, 2])
        ahead.step(2)
    assert batches.made == [0, 1, 2]


def test_an_error_shows_at_the_step_that_needs_the_batch() -> None:
    batches = Recorded(failing=1)
    with ahead_of(batches, 0, 3) as ahead:
        ahead.step(0)
        batches.wait_for([0, 1])
        with pytest.raises(ValueError, match="step 1 cannot be made"):
            ahead.step(1)


def test_batches_for_a_gpu_are_pinned_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned_by: list[threading.Thread] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # of a machine with a GPU
        pinned_by.append(threading.current_thread())
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    # Ids 2, positions 2, starts 2 and rows 1 of a specialist's one sequence of two tokens; a target and its class.
    microbatch = MicroBatch(torch.arange(9), {"text": (2,)}, [1])
    batches: Any = SimpleNamespace(step=lambda step: StepBatch([microbatch], {}, np.ones(1), Packing(0.0, 1.0, 1.0)))
    with StepsAhead(batches, 0, 1, torch.device("cuda")) as ahead:
        (found,) = ahead.step(0).microbatches
    assert torch.equal(found.targets, microbatch.targets) and found.tokens["text"].lengths == (2,)
    assert len(pinned_by) == 1 and pinned_by[0] is not threading.main_thread()


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_a_step_ends_the_thread(end: type[BaseException]) -> None:
    with pytest.raises(end), ahead_of(Recorded(), 0, 9) as ahead:
        ahead.step(0)
        raise end


def test_a_stage_that_ends_early_leaves_nothing_behind() -> None:
    with ahead_of(Recorded(), 0, 9) as ahead:
        ahead.step(0)
