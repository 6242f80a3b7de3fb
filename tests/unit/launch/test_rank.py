"""What a rank settles before anything can start CUDA."""

from __future__ import annotations

import os

import pytest
import torch

from ultrafuser_mega.config import load_config
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.launch import rank

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


class _ReachedError(Exception):
    pass


def _stop() -> None:
    raise _ReachedError


@pytest.mark.parametrize(("given", "found"), [(None, "1"), ("8", "8")])
def test_kernels_start_in_the_order_of_their_launch_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    monkeypatch.setattr(rank, "end_with_launcher", lambda: None)
    monkeypatch.setattr(rank, "launcher_store", _stop)  # the first that happens in a job
    with pytest.raises(_ReachedError):
        rank.train_main(None, [], resume=False)
    assert os.environ[NAME] == found


def test_a_restart_on_fewer_gpus_takes_the_next_layout_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["layouts=[{kind: colocated, tp: 2, dp: 4}, {kind: colocated, tp: 2, dp: 2}]"])
    gpus = 8
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert rank.ranks_left(config, 8) == 8
    gpus = 7
    assert rank.ranks_left(config, 8) == 4
    gpus = 3
    with pytest.raises(InputError, match=r"layouts: 3 rank\(s\) are left, and all of the layouts use more"):
        rank.ranks_left(config, 4)
