"""One rank of a training job: its command line, and its body from the configuration to the end of the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.planning.host_memory import check_host_memory
from ultrafuser_mega.planning.preflight import plan_layouts, preflight
from ultrafuser_mega.runtime.device import (
    choose_device,
    end_with_launcher,
    free_memory,
    joined_job,
    kind_of_device,
    launched_here,
    launched_rank,
    launched_ranks,
    launcher_store,
    start_kernels_in_order,
)
from ultrafuser_mega.runtime.failure import first_failure_ends_job, leave_for_torchrun
from ultrafuser_mega.runtime.layout import choose_plan, plan_that_fits
from ultrafuser_mega.training.lessons import Answering
from ultrafuser_mega.training.prepare import make_missing_toy
from ultrafuser_mega.training.run import run
from ultrafuser_mega.training.run_folder import begun_by_this_launch, refuse_running

_ENDED = "ended"  # what ranks without work wait for, and answer
_ANSWER_S = 30.0


def rank_arguments(
    config_path: Path | None, overrides: Sequence[str], resume: bool = False, requeue: bool = False
) -> list[str]:
    """The command line behind the program that every rank runs, whatever launches it."""
    arguments = [] if config_path is None else ["--config", str(config_path)]
    flags = [flag for flag, given in (("--resume", resume), ("--requeue", requeue)) if given]
    return [*arguments, *flags, "--", *overrides]


def train_main(
    config_path: Path | None,
    overrides: Sequence[str],
    resume: bool,
    requeue: bool = False,
    elastic: bool = False,
    answering: Answering | None = None,
) -> int:
    """Run one rank of a training job; returns its exit code, or ends the process where it fails (2: bad input).

    The code of a run that is not over is that of :class:`ultrafuser_mega.training.stopping.Stop`.

    Args:
        config_path: None: the embedded configuration.
        overrides: of it.
        resume: go on from the run's newest checkpoint.
        requeue: the same, if there is one.
        elastic: the same, on as many of the launched ranks as a layout fits; the others wait for its end.
        answering: of models, for a distillation that learns from answers.
    """
    end_with_launcher()
    start_kernels_in_order()
    store = launcher_store()
    with first_failure_ends_job(store):
        config = load_config(config_path, overrides)
        device = choose_device(config.device)
        if launched_rank() == 0:
            refuse_running(config.run_dir)
        idle = _without_work(config) if elastic else range(0)
        if launched_rank() in idle:
            store.wait([_ENDED], timedelta(days=3650))
            store.set(f"{_ENDED}/{launched_rank()}", "")
            return 0
        ensure_toy(config, launched_ranks())
        plan = preflight(config, launched_ranks(), _all_resume(store, config, resume, requeue or elastic))
        if device.type == "cuda":
            check_host_memory(plan, launched_here(), free_memory())
        with joined_job(device, store):
            stop = run(plan, device, store, answering)
        if launched_rank() == 0 and idle:
            store.set(_ENDED, "")
            with contextlib.suppress(dist.DistError):  # who may host the store does not go before all have asked it
                store.wait([f"{_ENDED}/{rank}" for rank in idle], timedelta(seconds=_ANSWER_S))
    if stop is None:
        return 0
    if stop.code:
        leave_for_torchrun(stop.why)
    return stop.code


def _without_work(config: FuserConfig) -> range:
    """The launched ranks that no layout fits; to the others the job looks as if there were none."""
    launched = launched_ranks()
    plan = plan_that_fits(plan_layouts(config), launched)
    idle = range(plan.world_size, launched)
    if idle and launched_rank() == 0:
        print(f"of {launched} ranks {len(idle)} wait, since no layout takes them: {plan.describe()}", flush=True)
    if launched_rank() not in idle:
        os.environ["WORLD_SIZE"] = str(plan.world_size)
    return idle


def ranks_left(config: FuserConfig, ranks: int) -> int:
    """Of ``ranks`` processes on this machine, each with a GPU, those that a restart may have: GPUs may have been lost.

    Raises:
        InputError: no layout is for so few.
    """
    gpus = torch.cuda.device_count()
    return ranks if gpus >= ranks else plan_that_fits(plan_layouts(config), gpus).world_size


def resumes(config: FuserConfig, resume: bool, requeue: bool) -> bool:
    """Whether the run goes on from a checkpoint: as told, or because it has one.

    One that this launch has begun goes on whatever was told: its ranks were started again.
    """
    if resume or not list_checkpoints(config.run_dir / "checkpoints"):
        return resume
    return requeue or begun_by_this_launch(config.run_dir)


def _all_resume(store: dist.Store, config: FuserConfig, resume: bool, requeue: bool) -> bool:
    """The answer of rank 0, for all ranks: its file system may know of a checkpoint before another's does."""
    if launched_rank() == 0:
        store.set("resumes", str(resumes(config, resume, requeue)))
    return store.get("resumes") == b"True"


def check_launch(config: FuserConfig, ranks: int) -> None:
    """What would end ``ranks`` processes on this machine as soon as they are up, known without starting them.

    Raises:
        InputError: no layout for so many, too few GPUs, or another job trains under this name.
    """
    choose_plan(plan_layouts(config), ranks)
    kind_of_device(config.device, ranks)
    refuse_running(config.run_dir)


def ensure_toy(config: FuserConfig, ranks: int) -> None:
    """Make the toy specialists when the configuration asks for them; one rank works, the others wait for it."""
    if config.toy is None:
        return
    choose_plan(plan_layouts(config), ranks)  # a wrong rank count should not cost minutes first
    make_missing_toy(config)
