"""``ultrafuser plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides, wide_console


def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(help="ranks the job will be launched with")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="also check the run's newest checkpoint")] = False,
) -> None:
    """Check everything without training, show what ranks hold.

    Folders, tensors, tokenizers, sizes, batches and data files are checked as a training job checks them. The table
    gives every rank's specialist and pipeline stage, its rows of the vocabulary, and the memory that weights,
    gradients and optimizer take in either stage.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.launch.local import ensure_toy
    from ultrafuser_mega.planning.plan_table import plan_table
    from ultrafuser_mega.planning.preflight import preflight

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    resolved = preflight(loaded, ranks, resume)
    console = wide_console()
    console.print(plan_table(resolved))
    for notice in resolved.notices:
        print(notice)
    console.print("checked: folders, tensors, tokenizers, layout, batch sizes, data files exist (their rows: prepare)")
