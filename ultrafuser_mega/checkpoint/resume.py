"""What a run that is resumed may change: its configuration against the one its checkpoint was written under.

Some changes cannot be followed and are refused. Others are someone's decision, or an override that was forgotten on
the second command line: those are said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ultrafuser_mega.checkpoint.checkpoint import Progress, advice, flat
from ultrafuser_mega.checkpoint.sources import CONFIG
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import InputError

# Settings under which other numbers come out. Layouts, paths and how often something is evaluated or saved do not.
_MATTERS = ("seed", "specialists.", "loss.", "data.max_length", "data.classes.", "data.on_malformed", "optimizer.")


def changed_settings(path: Path, progress: Progress, config: FuserConfig) -> tuple[str, ...]:
    """A line for each setting that ``config`` has otherwise than the run that wrote the checkpoint at ``path``.

    Only what still has an effect is compared: nothing where nothing was trained yet, stage 2's settings in stage 2.

    Raises:
        InputError: the checkpoint cannot be gone on from under ``config``; names the key and both values.
    """
    if progress.step == 0 or not (path / CONFIG).is_file():
        return ()
    before, now = _settings(path), flat(config.model_dump(mode="json"))
    _refuse_other_dtype(path, before, now)
    _refuse_other_steps(path, progress, before, now)
    stages = tuple(f"stage{stage}." for stage in (1, 2) if stage >= progress.stage)
    return tuple(
        f"note: {key} is {now.get(key)}, the run had {before.get(key)}"
        for key in dict.fromkeys([*now, *before])
        if key.startswith(_MATTERS + stages) and not key.endswith(".path") and before.get(key) != now.get(key)
    )


def _refuse_other_dtype(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Only a bf16 run's checkpoint holds fp32 master weights, which only a bf16 run reads.
    if before["dtype"] != now["dtype"]:
        raise InputError(
            f"dtype: {now['dtype']} cannot go on from {path}, which was trained with dtype {before['dtype']}; "
            f"set dtype={before['dtype']}"
        )


def _refuse_other_steps(path: Path, progress: Progress, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Steps are counted through both stages: stage 2's would get other numbers than those already in the metrics.
    steps = "stage1.steps"
    if progress.stage == 2 and before[steps] != now[steps]:
        raise InputError(
            f"{steps}: {now[steps]} cannot go on from {path}, which did {before[steps]} steps in stage 1 and is in "
            f"stage 2; set {steps}={before[steps]}"
        )
    steps = f"stage{progress.stage}.steps"
    if now[steps] < progress.step:
        raise InputError(
            f"{steps}: {now[steps]} is less than the {progress.step} steps that {path} has done; "
            f"set {steps} to {progress.step} or more"
        )


def _settings(path: Path) -> dict[str, Any]:
    """The flat settings that the checkpoint at ``path`` keeps."""
    try:
        settings = flat(yaml.safe_load((path / CONFIG).read_text()))
        if not {"dtype", "stage1.steps"} <= settings.keys():
            raise ValueError("no dtype or no stage1.steps")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path / CONFIG}: damaged ({reason}); {advice(path)}") from None
    return settings
