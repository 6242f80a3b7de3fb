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


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console
