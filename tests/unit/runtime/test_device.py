"""Which device a rank takes: a GPU of its own, or the CPU like all others."""

from __future__ import annotations

import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.device import choose_device


def choose(monkeypatch: pytest.MonkeyPatch, wanted: str, *, gpus: int, local_rank: int, local_ranks: int) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    return str(choose_device(wanted))


def test_every_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("auto", "cuda"):
        assert choose(monkeypatch, wanted, gpus=8, local_rank=5, local_ranks=8) == "cuda:5"


def test_auto_takes_the_cpu_on_all_ranks_where_gpus_do_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on the ranks that could have had one: a job runs on one kind of device."""
    for local_rank in (0, 7):
        assert choose(monkeypatch, "auto", gpus=4, local_rank=local_rank, local_ranks=8) == "cpu"


def test_cpu_is_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "cpu", gpus=8, local_rank=0, local_ranks=1) == "cpu"


def test_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"device = cuda: local rank 4 needs a GPU of its own, this machine has 4; use"
    ):
        choose(monkeypatch, "cuda", gpus=4, local_rank=4, local_ranks=8)
