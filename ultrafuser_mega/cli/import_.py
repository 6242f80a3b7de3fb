"""``ultrafuser import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|HF_DIR", help="a run's YAML file, or one model folder")],
    checkpoint: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: the smallest that holds all of theirs")
    ] = None,
) -> None:
    """Make a checkpoint of step 0 from Hugging Face folders.

    With a configuration all of its specialists and a fresh gate go in, with a folder that one under the name
    "specialist". Needs memory for all weights at once.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.convert.dtypes import parse_dtype
    from ultrafuser_mega.convert.importer import SINGLE, import_specialists, plan_config, plan_folders

    wanted = parse_dtype(dtype)
    if source.is_dir():
        resolved = plan_folders({SINGLE: source}, wanted)
    else:
        resolved = plan_config(load_config(source, []), wanted)
    import_specialists(resolved, checkpoint)
    for notice in resolved.notices:
        print(notice)
    print(f"wrote {checkpoint}: {', '.join(resolved.architectures)} in {str(resolved.dtype).removeprefix('torch.')}")
