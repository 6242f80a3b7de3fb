"""``ultrafuser train``."""

from __future__ import annotations

from functools import partial

import typer

from ultrafuser_mega.cli.options import Config, MaxRestarts, Overrides, Ranks, Requeue, Resume


def train(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Ranks = None,
    resume: Resume = False,
    requeue: Requeue = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Check everything, tokenise, then train on this machine.

    Stage 1 trains the gate, stage 2 everything. runs/<name> receives config.yaml, metrics.jsonl, TensorBoard events,
    checkpoints, plots and, at the end, summary.json and the tables in results.md.

    On several machines: torchrun with examples/pretrain_fuser.py, or `ultrafuser slurm`.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.data.store import TokenStore
    from ultrafuser_mega.launch.local import from_checkpoints, launch_local
    from ultrafuser_mega.launch.rank import check_launch, ensure_toy, rank_arguments, ranks_left, resumes
    from ultrafuser_mega.planning.preflight import compared_with_data, first_layouts_ranks, preflight
    from ultrafuser_mega.runtime.device import kind_of_device
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    ranks = ranks or first_layouts_ranks(loaded)
    check_launch(loaded, ranks)
    ensure_toy(loaded, ranks)
    resume = resumes(loaded, resume, requeue)
    plan = preflight(loaded, ranks, resume)
    prepare_data(loaded, plan.vocab_size)
    compared_with_data(plan, TokenStore.open(loaded.store_dir, verify=False))
    program = ["-m", "ultrafuser_mega.cli.rank", *rank_arguments(config, overrides or [], resume)]
    on_gpus = kind_of_device(loaded.device, ranks) == "cuda"
    left = partial(ranks_left, loaded, ranks) if on_gpus else None
    raise typer.Exit(launch_local(ranks, program, from_checkpoints(loaded.run_dir), max_restarts, left))
