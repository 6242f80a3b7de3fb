"""Which device a rank takes: a GPU of its own, or the CPU like all others."""

from __future__ import annotations

import sys

import psutil
import pytest
import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.device import choose_device, launch_name


def choose(monkeypatch: pytest.MonkeyPatch, wanted: str, *, gpus: int, local_rank: int, local_ranks: int) -> str:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    return str(choose_device(wanted))


def test_every_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("auto", "cuda"):
        assert choose(monkeypatch, wanted, gpus=8, local_rank=5, local_ranks=8) == "cuda:5"


@pytest.mark.parametrize("local_rank", [0, 7])
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch, wanted: str, local_rank: int
) -> None:
    """Also on the ranks that could have had one, and never a job on CPUs beside idle GPUs."""
    message = (
        f"^device = {wanted}: every rank needs a GPU of its own: 8 rank\\(s\\) on this machine, which has 4; "
        "launch 4 or fewer ranks here, or set device=cpu$"
    )
    with pytest.raises(InputError, match=message):
        choose(monkeypatch, wanted, gpus=4, local_rank=local_rank, local_ranks=8)


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "auto", gpus=0, local_rank=3, local_ranks=8) == "cpu"


def test_cpu_is_taken_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "cpu", gpus=8, local_rank=0, local_ranks=1) == "cpu"
    assert choose(monkeypatch, "cpu", gpus=4, local_rank=7, local_ranks=8) == "cpu"


def test_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"1 rank\(s\) on this machine, which has 0; set device=cpu$"):
        choose(monkeypatch, "cuda", gpus=0, local_rank=0, local_ranks=1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes began by the clock")
def test_a_launch_is_the_same_when_the_clock_has_jumped(monkeypatch: pytest.MonkeyPatch) -> None:
    name = launch_name()
    booted = psutil.boot_time() + 3600  # as the system says after such a jump
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted)
    assert launch_name() == name
