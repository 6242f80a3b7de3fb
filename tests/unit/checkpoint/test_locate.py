"""A run's folder stands for its newest complete checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from ultrafuser_mega.checkpoint.locate import find_checkpoint, is_checkpoint
from ultrafuser_mega.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("stage1-step0000400", "stage2-step0000100"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "progress.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / "stage2-step0000200").mkdir()  # not complete
    return tmp_path / "run"


def test_the_newest_complete_checkpoint_is_found(run: Path) -> None:
    newest = run / "checkpoints" / "stage2-step0000100"
    for place in (run, run / "checkpoints", newest):
        assert find_checkpoint(place) == newest
        assert is_checkpoint(place)
    older = run / "checkpoints" / "stage1-step0000400"
    assert find_checkpoint(older) == older


def test_what_is_no_run_comes_back_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for place in (tmp_path / "model", tmp_path / "gone"):
        assert find_checkpoint(place) == place
        assert not is_checkpoint(place)


def test_a_run_without_a_complete_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "stage1-step0000001").mkdir(parents=True)
    with pytest.raises(InputError, match=r"run: no complete checkpoint yet"):
        find_checkpoint(tmp_path / "run")
