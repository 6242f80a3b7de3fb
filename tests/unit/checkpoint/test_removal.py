"""A checkpoint that is being removed is none any more, however its removal ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ultrafuser_mega.checkpoint.checkpoint import PROGRESS, list_checkpoints, remove_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "stage1-step0000002"
    path.mkdir()
    for name in (PROGRESS, "__0_0.distcp"):
        (path / name).write_text("{}")
    return path


def test_a_removal_that_is_interrupted_leaves_no_half_of_a_checkpoint_under_its_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **unused: object) -> None:
        if path.exists():
            (path / "__0_0.distcp").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        remove_checkpoint(checkpoint)
    assert list_checkpoints(checkpoint.parent) == []
    (leftover,) = checkpoint.parent.iterdir()
    assert leftover.match(".*.partial"), "what the next save clears away"


def test_a_checkpoint_is_removed_whatever_an_interrupted_removal_left(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.with_name(f".{checkpoint.name}.old.partial"))
    remove_checkpoint(checkpoint)
    remove_checkpoint(checkpoint)  # there is none any more
    assert list(checkpoint.parent.iterdir()) == []
