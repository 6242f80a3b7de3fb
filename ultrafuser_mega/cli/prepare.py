"""``ultrafuser prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides, wide_console


def prepare(
    overrides: Overrides = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="rebuild a store made from other inputs")] = False,
    copy_to: Annotated[
        Path | None,
        typer.Option(help="also copy the store to this folder, checked, as to a node's own disk", show_default=False),
    ] = None,
) -> None:
    """Tokenise the data; tell what was dropped and why.

    The memory-mapped store goes where data.store says, by default into the run's folder. A training job does this by
    itself where it was not done before, and uses a store that was made from the same inputs.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.data.store_copy import copy_store
    from ultrafuser_mega.planning.preflight import shared_vocabulary
    from ultrafuser_mega.toy import make_toy
    from ultrafuser_mega.training.prepare import data_notes
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    if loaded.toy is not None:
        make_toy(loaded.toy, progress=True)
    report = prepare_data(loaded, shared_vocabulary(loaded), overwrite=overwrite)
    console = wide_console()
    console.print(report.table())
    console.print(report.endings(), markup=False, highlight=False, soft_wrap=True)
    for line in [*report.problems(), *data_notes(loaded, report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if copy_to is not None:
        done = "copied to" if copy_store(loaded.store_dir, copy_to) else "already in"
        console.print(f"{done} {copy_to}", markup=False, highlight=False, soft_wrap=True)
