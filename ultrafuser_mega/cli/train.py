"""``ultrafuser train``."""

from __future__ import annotations

from typing import Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides


def train(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(help="processes to start on this machine")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")] = False,
) -> None:
    """Check everything, tokenise, then train on this machine.

    Stage 1 trains the gate, stage 2 everything. runs/<name> receives config.yaml, metrics.jsonl, TensorBoard events,
    checkpoints, plots and, at the end, summary.json and the tables in results.md.

    On several machines: torchrun or SLURM with examples/pretrain_fuser.py, see examples/slurm.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.launch.local import ensure_toy, launch_local
    from ultrafuser_mega.planning.preflight import preflight
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    prepare_data(loaded, preflight(loaded, ranks, resume).vocab_size)
    launch_local(ranks, config, overrides or [], resume)
