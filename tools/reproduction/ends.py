"""How the commands end: what was written, or one line for what is wrong and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer

from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError


def told(work: Callable[[], Path]) -> None:
    """Do ``work`` and say what it wrote."""
    # Behind the options: torch and Megatron take seconds.
    from reproduction.runner import ExperimentError, StoppedError

    try:
        page = work()
    except InputError as error:
        raise refused(error) from None
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except (StoppedError, KeyboardInterrupt):
        print("interrupted; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"wrote {page}")


def refused(error: InputError) -> typer.Exit:
    """For bad input."""
    print(f"error: {error}", file=sys.stderr)
    return typer.Exit(EXIT_BAD_INPUT)
