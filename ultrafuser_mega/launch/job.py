"""A training job on this machine from a configuration: everything is checked, tokenised, then ranks are started."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.launch.local import from_checkpoints, launch_local
from ultrafuser_mega.launch.rank import check_launch, ensure_toy, rank_arguments, ranks_left, resumes
from ultrafuser_mega.planning.preflight import compared_with_data, first_layouts_ranks, preflight
from ultrafuser_mega.runtime.device import kind_of_device
from ultrafuser_mega.training.prepare import ended_by_epochs, prepare


def train_here(
    config: FuserConfig,
    config_path: Path | None,
    overrides: Sequence[str] = (),
    *,
    ranks: int | None = None,
    resume: bool = False,
    requeue: bool = False,
    max_restarts: int = 0,
) -> int:
    """Train as ``config`` says; returns the job's exit code (see :func:`ultrafuser_mega.launch.local.launch_local`).

    Args:
        config: of the run.
        config_path: the file that ranks read it from; None: the embedded configuration.
        overrides: of it.
        ranks: processes; None: those of the first of its layouts.
        resume: go on from the run's newest checkpoint.
        requeue: the same, if there is one.
        max_restarts: how often all ranks are started anew when one has failed.

    Raises:
        InputError: something is wrong that can be known before.
    """
    ranks = ranks or first_layouts_ranks(config)
    check_launch(config, ranks)
    ensure_toy(config, ranks)
    resume = resumes(config, resume, requeue)
    plan = preflight(config, ranks, resume)
    prepare(config, plan.vocab_size)
    store = TokenStore.open(config.store_dir, verify=False)
    ended_by_epochs(compared_with_data(plan, store), store)
    program = ["-m", "ultrafuser_mega.cli.rank", *rank_arguments(config_path, overrides, resume)]
    on_gpus = kind_of_device(config.device, ranks) == "cuda"
    left = partial(ranks_left, config, ranks) if on_gpus else None
    return launch_local(ranks, program, from_checkpoints(config.run_dir), max_restarts, left)
