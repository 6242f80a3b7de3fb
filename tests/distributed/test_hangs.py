"""A rank hangs, its peers wait for it in a collective: the job ends and the last line names that rank and its place."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from support.launched import launch

from ultrafuser_mega.runtime.device import joined_job, launched_rank, launcher_store
from ultrafuser_mega.runtime.failure import first_failure_ends_job
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.watchdog import Watchdog


def hang_while_others_wait(hanging: int) -> int:
    store, phases = launcher_store(), Phases()
    watchdog = Watchdog(store, launched_rank(), 3, phases, lambda: (7, "stage 1 step 7 of 9"), 1.5)
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store), watchdog.watching():
        for _ in range(4):  # each as long as half of what is allowed: together they are no hang
            with phases("data"):
                time.sleep(0.7)
        if launched_rank() == hanging:
            with phases("data"):
                fall_asleep()
        with phases("exchange"):
            dist.all_reduce(torch.ones(1))
    return 0


def fall_asleep() -> None:
    time.sleep(50)


def test_the_rank_that_hangs_is_named_with_phase_and_stack(tmp_path: Path) -> None:
    codes, errors = launch(hang_while_others_wait, tmp_path, 2)
    assert codes == [1, 1, 1]
    *stack, last = errors.splitlines()
    assert last.startswith("failed: rank 2 of 3 hangs for ")
    assert last.endswith(" s in data, stage 1 step 7 of 9; ranks 0, 1 in exchange")
    assert "fall_asleep" in "\n".join(stack)


def work_for_long(busy: int) -> int:
    """Rank ``busy`` works on four times as long as is allowed and gives signs of life; the others are done at once."""
    store, phases = launcher_store(), Phases()
    watchdog = Watchdog(store, launched_rank(), 3, phases, lambda: (7, "stage 1 step 7 of 9"), 1.5)
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store), watchdog.watching():
        with phases("answering"):
            for _ in range(12 if launched_rank() == busy else 0):
                time.sleep(0.5)
                phases.go_on()
            dist.all_reduce(torch.ones(1))
        with phases("exchange"):
            if launched_rank() == 0:
                fall_asleep()
            dist.all_reduce(torch.ones(1))
    return 0


def test_ranks_that_wait_for_one_that_works_on_do_not_hang_and_one_that_does_later_is_named(tmp_path: Path) -> None:
    codes, errors = launch(work_for_long, tmp_path, 1)
    assert codes == [1, 1, 1]
    assert errors.splitlines()[-1].startswith("failed: rank 0 of 3 hangs for ")
    assert errors.splitlines()[-1].endswith(" s in exchange, stage 1 step 7 of 9; ranks 1, 2 in exchange")
