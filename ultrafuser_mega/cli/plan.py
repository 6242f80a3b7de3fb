"""``ultrafuser plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides, Ranks, wide_console


def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Ranks = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="also check the run's newest checkpoint; what would be other than before")
    ] = False,
) -> None:
    """Check everything without training, show what ranks hold.

    Folders, tensors, tokenizers, sizes, batches and data files are checked as a training job checks them. The table
    gives every rank's specialist and pipeline stage, its rows of the vocabulary, and the memory that weights,
    gradients and optimizer take in either stage.

    A configuration's layouts are alternatives: a job takes the first that uses exactly its ranks.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.data.store import MANIFEST, TokenStore
    from ultrafuser_mega.launch.rank import ensure_toy
    from ultrafuser_mega.planning.memory import rank_shares
    from ultrafuser_mega.planning.preflight import chosen_layout, compared_with_data, first_layouts_ranks, preflight
    from ultrafuser_mega.reporting.plan_table import plan_table

    ranks = ranks or first_layouts_ranks(loaded)
    ensure_toy(loaded, ranks)
    resolved = preflight(loaded, ranks, resume)
    if (loaded.store_dir / MANIFEST).is_file():
        resolved = compared_with_data(resolved, TokenStore.open(loaded.store_dir, verify=False))
    console = wide_console()
    console.print(plan_table(resolved.layout.describe(), rank_shares(resolved)))
    lines = [chosen_layout(resolved)]
    if resolved.resume is not None:
        lines += [f"--resume: goes on from {resolved.resume[1]}", *(resolved.changes or ["as the run was before"])]
    lines += resolved.notices
    lines.append("checked: folders, tensors, tokenizers, layout, batch sizes, data files exist (their rows: prepare)")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
