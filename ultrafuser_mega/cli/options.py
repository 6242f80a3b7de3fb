"""Options and helpers that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; default: the embedded toy run", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value]...", help="override configuration values", show_default=False),
]
Ranks = Annotated[
    int | None,
    typer.Option(help="processes of the job; default: those of the first of layouts", min=1, show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts", min=0, help="start all ranks again, from the newest checkpoint, so often when one has failed"
    ),
]
Requeue = Annotated[bool, typer.Option("--requeue", help="--resume if the run has a checkpoint, else start afresh")]


def wide_console(columns: int = 160) -> Console:
    """Standard output; where it is no terminal, ``columns`` wide: enough for every table."""
    console = Console()
    if not console.is_terminal:
        console.width = columns
    return console
