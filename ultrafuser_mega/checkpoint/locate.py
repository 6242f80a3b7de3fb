"""Which checkpoint is meant: wherever one is asked for, a run's folder stands for its newest."""

from __future__ import annotations

from pathlib import Path

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, list_checkpoints
from ultrafuser_mega.errors import InputError


def find_checkpoint(path: Path) -> Path:
    """``path``, or the newest complete checkpoint in it where it is a run's folder or its ``checkpoints/``.

    What is neither comes back as it is: whoever reads it says what is wrong with it.

    Raises:
        InputError: a run that has no complete checkpoint.
    """
    if (path / PROGRESS).is_file():
        return path
    for place in (path / "checkpoints", path):
        if found := list_checkpoints(place):
            return found[-1][1]
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{path}: no complete checkpoint yet; a run writes one every checkpoint.every steps")
    return path


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint, or a run's folder that holds one."""
    return (path / PROGRESS).is_file() or any(list_checkpoints(place) for place in (path / "checkpoints", path))
