"""``ultrafuser doctor``."""

from __future__ import annotations

import typer
from rich.console import Console


def doctor() -> None:
    """Versions, device, accelerators; what is missing for what.

    Exit code 1 when something that every run needs is missing.
    """
    from ultrafuser_mega.cli.machine import report

    healthy = report(Console())
    raise typer.Exit(0 if healthy else 1)
