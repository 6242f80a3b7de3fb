"""What a run that is resumed may change: its configuration and data against those its checkpoint was written under.

Some changes cannot be followed and are refused. Others are someone's decision, or an override that was forgotten on
the second command line: those are said.

A table compares the fused model with the specialists as they came, all on the same held-out samples. In stage 1 the
specialists still are as they came, so other samples only mean evaluating all models again, which every resumed run
does; from stage 2 on their rows could not be made again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ultrafuser_mega.checkpoint.checkpoint import DamagedCheckpointError, flat
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import CONFIG, DATA
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.data.store import SPLITS, TokenStore, digest
from ultrafuser_mega.errors import InputError

# Settings under which other numbers come out. Layouts, paths and how often something is evaluated or saved do not.
_MATTERS = (
    *("seed", "specialists.", "loss.", "optimizer."),
    *("data.sampling", "data.max_length", "data.classes.", "data.on_malformed"),
    *("lora.dropout", "distil."),  # an adapter's shape and scale are of the model, and refused
)

_AGAIN = "all models are evaluated anew"


def changed_settings(path: Path, progress: Progress, config: FuserConfig) -> tuple[str, ...]:
    """A line for each setting that ``config`` has otherwise than the run that wrote the checkpoint at ``path``.

    Only what still has an effect is compared: nothing where nothing was trained yet, stage 2's settings in stage 2.

    Raises:
        InputError: the checkpoint cannot be gone on from under ``config``; names the key and both values.
    """
    if progress.step == 0 or not (path / CONFIG).is_file():
        return ()
    before, now = _settings(path), _flat(config.model_dump(mode="json"))
    _refuse_other_dtype(path, before, now)
    by_epochs = {number for number in (1, 2) if _same_epochs(number, before, now)}
    _refuse_other_steps(path, progress, before, now, by_epochs)
    left = (f"stage{stage}." for stage in (1, 2) if stage >= progress.stage)
    stages = tuple(
        stage if now[f"{stage}steps"] else f"{stage}steps" for stage in left
    )  # one without steps has no rates
    return tuple(
        f"note: {key} is {now.get(key)}, the run had {before.get(key)}"
        for key in dict.fromkeys([*now, *before])
        if key.startswith(_MATTERS + stages)
        and not key.endswith(".path")
        and before.get(key) != now.get(key)
        and key not in {f"stage{number}.steps" for number in by_epochs}
    )


def data_record(store: TokenStore) -> dict[str, Any]:
    """What a checkpoint says of its run's data: enough to tell later which samples are other ones."""
    parts = store.manifest["splits"]
    splits = {
        name: {
            split: {"samples": parts[name][split]["samples"], "digest": digest(parts[name][split]["files"])}
            for split in SPLITS
        }
        for name in store.class_names
    }
    return {"fingerprint": store.fingerprint, "splits": splits}


def changed_data(path: Path, progress: Progress, config: FuserConfig, store: TokenStore) -> tuple[str, ...]:
    """A line for each way in which the samples of ``store`` are not those of the run that wrote ``path``.

    Raises:
        InputError: a run in stage 2 would be evaluated on other samples than its specialists were.
    """
    if progress.step == 0 or not (path / CONFIG).is_file():
        return ()
    now = data_record(store)
    before = _data(path)
    remarks = []
    if before is None:
        remarks.append(f"note: {path} does not say what data the run had; they are taken to be those of now")
        before = now
    elif before["fingerprint"] == now["fingerprint"]:
        before = now
    if trained := _other_classes(before, now, "train"):
        remarks.append(f"note: the training samples of {', '.join(trained)} are not those that the run had")
    key = "evaluation.samples_per_class"
    had, has = int(_settings(path).get(key, config.evaluation.samples_per_class)), config.evaluation.samples_per_class
    if held_out := _other_classes(before, now, "heldout"):
        _refuse_in_stage_2(
            path,
            progress,
            f"data: the held-out samples of {', '.join(held_out)} are other ones; give back those that the run had",
        )
        remarks.append(f"note: the held-out samples of {', '.join(held_out)} are not those that the run had; {_AGAIN}")
    if _evaluated(now, has) != _evaluated(now, had):
        _refuse_in_stage_2(path, progress, f"{key}: {has}, the run had {had}; set {key}={had}")
        remarks.append(f"note: {key} is {has}, the run had {had}; {_AGAIN}")
    return tuple(remarks)


def _other_classes(before: dict[str, Any], now: dict[str, Any], split: str) -> list[str]:
    """Classes whose samples of ``split`` changed, came or went."""
    then = before["splits"]
    names = dict.fromkeys([*now["splits"], *then])
    return [name for name in names if then.get(name, {}).get(split) != now["splits"].get(name, {}).get(split)]


def _evaluated(record: dict[str, Any], samples_per_class: int) -> dict[str, int]:
    """How many samples of each class an evaluation takes."""
    return {name: min(samples_per_class, splits["heldout"]["samples"]) for name, splits in record["splits"].items()}


def _refuse_in_stage_2(path: Path, progress: Progress, problem: str) -> None:
    if progress.stage == 2:
        raise InputError(
            f"{problem}, or start a run of another name: {path} is in stage 2, and its tables compare the fused model "
            "with specialists as they came on the same samples"
        )


def _data(path: Path) -> dict[str, Any] | None:
    """What the checkpoint at ``path`` keeps of :func:`data_record`; None from a version that kept nothing."""
    try:
        record: dict[str, Any] = json.loads((path / DATA).read_text())
        if not isinstance(record["fingerprint"], str) or not isinstance(record["splits"], dict):
            raise ValueError("no fingerprint or no splits")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path / DATA}: damaged ({error!r})", path) from None
    return record


def _refuse_other_dtype(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    # Only a bf16 run's checkpoint holds fp32 master weights, which only a bf16 run reads.
    if before["dtype"] != now["dtype"]:
        raise InputError(
            f"dtype: {now['dtype']} cannot go on from {path}, which was trained with dtype {before['dtype']}; "
            f"set dtype={before['dtype']}"
        )


def steps_by_epochs(path: Path, config: FuserConfig) -> dict[int, int]:
    """Stage -> its steps as the run that wrote the checkpoint at ``path`` counted them, of those that end by epochs."""
    if not (path / CONFIG).is_file():
        return {}
    before, now = _settings(path), _flat(config.model_dump(mode="json"))
    return {number: int(before[f"stage{number}.steps"]) for number in (1, 2) if _same_epochs(number, before, now)}


def _same_epochs(number: int, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a stage ends by as many epochs as it did: its steps then are what the data make of them."""
    key = f"stage{number}.epochs"
    return now.get(key) is not None and before.get(key) == now[key]


def _refuse_other_steps(
    path: Path, progress: Progress, before: dict[str, Any], now: dict[str, Any], by_epochs: Collection[int]
) -> None:
    # Steps are counted through both stages: stage 2's would get other numbers than those already in the metrics.
    steps = "stage1.steps"
    if progress.stage == 2 and 1 not in by_epochs and before[steps] != now[steps]:
        raise InputError(
            f"{steps}: {now[steps]} cannot go on from {path}, which did {before[steps]} steps in stage 1 and is in "
            f"stage 2; set {steps}={before[steps]}"
        )
    steps = f"stage{progress.stage}.steps"
    if now[steps] < progress.step and progress.stage not in by_epochs:
        raise InputError(
            f"{steps}: {now[steps]} is less than the {progress.step} steps that {path} has done; "
            f"set {steps} to {progress.step} or more"
        )


def _settings(path: Path) -> dict[str, Any]:
    """The flat settings that the checkpoint at ``path`` keeps."""
    try:
        settings = _flat(yaml.safe_load((path / CONFIG).read_text()))
        if not {"dtype", "stage1.steps"} <= settings.keys():
            raise ValueError("no dtype or no stage1.steps")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DamagedCheckpointError(f"{path / CONFIG}: damaged ({reason})", path) from None
    return settings


def _flat(tree: Any) -> dict[str, Any]:
    """Settings by key; weights of classes are one setting, and the first versions knew none but balanced."""
    settings = flat(tree)
    weights = {key: settings.pop(key) for key in sorted(settings) if key.startswith("data.sampling.")}
    words = ", ".join(f"{key.rpartition('.')[2]}: {weight:g}" for key, weight in weights.items())
    return {"data.sampling": f"{{{words}}}" if words else "balanced"} | settings
