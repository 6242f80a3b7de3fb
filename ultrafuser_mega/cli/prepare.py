"""``ultrafuser prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides, wide_console

if TYPE_CHECKING:
    from ultrafuser_mega.config import FuserConfig


def prepare(
    overrides: Overrides = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="rebuild a store made from other inputs")] = False,
    copy_to: Annotated[
        Path | None,
        typer.Option(
            help="copy the store, which is made if there is none yet, to this folder, checked, as to a node's own disk",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Tokenise the data; tell what was dropped and why.

    The memory-mapped store goes where data.store says, by default into the run's folder. A training job does this by
    itself where it was not done before, and uses a store that was made from the same inputs.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration, which a misspelt key need not wait for.
    from ultrafuser_mega.data.store import MANIFEST
    from ultrafuser_mega.data.store_copy import copy_store

    if overwrite or copy_to is None or not (loaded.store_dir / MANIFEST).is_file():
        _prepare(loaded, overwrite)
    if copy_to is not None:  # by every node of a job: what has been made is not compared with all data again
        print("copied to" if copy_store(loaded.store_dir, copy_to) else "already in", copy_to)


def _prepare(config: FuserConfig, overwrite: bool) -> None:
    # Not for a copy: torch and Megatron take seconds.
    from ultrafuser_mega.data.store import TokenStore
    from ultrafuser_mega.planning.preflight import check_data_files, shared_vocabulary
    from ultrafuser_mega.training.prepare import data_notes, in_steps, make_missing_toy
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    make_missing_toy(config)
    check_data_files(config)
    report = prepare_data(config, shared_vocabulary(config), overwrite=overwrite)
    console = wide_console()
    console.print(report.table())
    console.print(report.endings(), markup=False, highlight=False, soft_wrap=True)
    counted = in_steps(config, TokenStore.open(config.store_dir, verify=False))
    for line in [*report.problems(), *data_notes(counted, report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
