"""``ultrafuser import``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer
import yaml

from ultrafuser_mega.errors import InputError


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG|RELEASE|HF_DIR", help="a run's YAML file, a release, or one model folder")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key.sub=value]...", help="override the configuration's values", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: the smallest that holds all of theirs")
    ] = None,
) -> None:
    """Make a checkpoint of step 0: something to train from, and to export in other forms.

    With a configuration all of its specialists and a fresh gate go in, with a release its specialists and its trained
    gate and heads, with a folder that one under the name "specialist". A run begins with it by checkpoint.start.
    Needs memory for all weights at once.
    """
    from ultrafuser_mega.config import load_config

    if source.is_dir() and overrides:
        raise InputError(f"{' '.join(overrides)}: overrides belong to a configuration; {source} is a folder")
    config = None if source.is_dir() else load_config(source, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.checkpoint.locate import is_checkpoint
    from ultrafuser_mega.convert.importer import SINGLE, import_specialists, plan_config, plan_folders, plan_release
    from ultrafuser_mega.models.dtypes import parse_dtype
    from ultrafuser_mega.release.check import is_release

    wanted = parse_dtype(dtype)
    if is_checkpoint(source):
        raise InputError(f"{source}: is a checkpoint already; a run begins with it by checkpoint.start={source}")
    if config is not None:
        resolved = plan_config(config, wanted)
        advice = f"train from it: ultrafuser train --config {' '.join([str(source), *(overrides or [])])}"
        advice += f" checkpoint.start={checkpoint}"
    elif is_release(source):
        resolved = plan_release(source, wanted)
        settings = yaml.safe_dump(resolved.settings(checkpoint), sort_keys=False)
        advice = f"train it further with a configuration that says\n{textwrap.indent(settings.rstrip(), '  ')}"
    else:
        resolved = plan_folders({SINGLE: source}, wanted)
        advice = f"ultrafuser export {checkpoint} OUT gives it back; to fuse it, name its folder in a configuration"
    import_specialists(resolved, checkpoint)
    for notice in resolved.notices:
        print(notice)
    print(f"wrote {checkpoint}: {', '.join(resolved.architectures)} in {str(resolved.dtype).removeprefix('torch.')}")
    print(advice)
