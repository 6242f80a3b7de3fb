"""What a rank settles before anything can start CUDA."""

from __future__ import annotations

import os

import pytest

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
