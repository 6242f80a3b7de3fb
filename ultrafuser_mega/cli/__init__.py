"""The ``ultrafuser`` command: one file per command; nothing else knows of typer."""

from ultrafuser_mega.cli.main import main

__all__ = ["main"]
