"""``ultrafuser export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def export_(
    checkpoint: Annotated[Path, typer.Argument(help="what train or import wrote; runs/<name>: its newest")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    what: Annotated[
        str | None,
        typer.Option(
            help="fused, specialist:NAME, or adapter:NAME for PEFT; default: fused, or the only specialist",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from an interrupted export")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare with the checkpoint")] = False,
) -> None:
    """Write a checkpoint's fused model, or one of its specialists, as a Hugging Face folder.

    Reads and writes tensor by tensor, whatever layout wrote the checkpoint, in memory for one tensor; export.json
    keeps the SHA-256 of every tensor. Then the folder's logits on a short text are compared with the checkpoint's
    (see verify), which needs memory for the whole exported model in float32: --no-verify leaves that out. The folder
    gets its name when it is complete and equal; exit code 1, and a hidden name, where it computes something else.

    Adapters (LoRA) are merged into the weights, whichever of them is written; with adapter:NAME they stay apart, in a
    folder that peft loads beside the specialist's own.
    """
    from ultrafuser_mega.convert.compare import DifferentModel
    from ultrafuser_mega.convert.export import export

    try:
        notices = export(checkpoint, out, what, resume=resume, verify=not no_verify)
    except DifferentModel as difference:
        print(f"error: {difference}", file=sys.stderr)
        raise typer.Exit(1) from None
    for notice in notices:
        print(notice)
    print(f"wrote {out}")
