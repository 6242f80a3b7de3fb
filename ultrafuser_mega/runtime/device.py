"""Which device, which collectives; joining and leaving the job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ultrafuser_mega.errors import InputError


def launched_ranks() -> int:
    """Ranks of this job according to its launcher; 1 when started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank according to its launcher."""
    return int(os.environ.get("RANK", "0"))


def choose_device(wanted: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> this rank's device.

    Raises:
        InputError: CUDA is asked for and there is no GPU for this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and local_rank >= gpus:
        raise InputError(
            f"device = cuda: local rank {local_rank} needs a GPU of its own, this machine has {gpus}; use device=cpu"
        )
    enough = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted == "cpu" or (wanted == "auto" and not enough):
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def joined_job(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the process group the launcher prepared (alone when started by hand), and leave it at the end.

    CPU tensors travel by gloo everywhere; on GPUs, CUDA tensors by NCCL.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Binding the device makes NCCL communicators eagerly, in the same order on every rank.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
