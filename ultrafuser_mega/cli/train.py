"""``ultrafuser train``."""

from __future__ import annotations

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
    from ultrafuser_mega.launch.job import train_here

    raise typer.Exit(
        train_here(
            loaded, config, overrides or [], ranks=ranks, resume=resume, requeue=requeue, max_restarts=max_restarts
        )
    )
