"""Which device, which collectives; joining and leaving the job."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.gloo import IN_ORDER
from ultrafuser_mega.runtime.start import name_of_start

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def launched_ranks() -> int:
    """Ranks of this job according to its launcher; 1 when started by hand."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This process's rank according to its launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_here() -> int:
    """Ranks of this job on this machine according to its launcher, as far as it tells; 1 when started by hand."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0")) + 1)


def launch_name() -> str:
    """A name that all attempts of one launch share on its rank 0, and no other launch has."""
    launcher = os.getppid()
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # which people may give, and give twice
    return f"{run_id} {socket.gethostname()} {launcher} {_began(launcher)}"


def _began(process: int) -> str:
    """When it did: on Linux in ticks since the machine's start, which no change of the clock moves."""
    if sys.platform == "linux":
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return str(psutil.Process(process).create_time())


def end_with_launcher() -> None:
    """Have the system end this rank when its launcher dies without ending it (kill -9, out of memory); Linux alone can.

    Ranks that live on would hold GPUs, memory and the run's name, and nobody would see what becomes of them.
    """
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # not by hand, whose shell may go
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def start_kernels_in_order() -> None:
    """Have a GPU start kernels in the order of their launch, unless the environment says otherwise; before CUDA starts.

    So that Megatron's tensor-parallel collectives begin before the products that they are to run beside.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def choose_device(wanted: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> this rank's device.

    Raises:
        InputError: this machine has GPUs, or they are asked for, and there are fewer than ranks.
    """
    if kind_of_device(wanted, launched_here()) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; the host does not wait for a GPU to have it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def kind_of_device(wanted: str, ranks: int) -> str:
    """``cpu`` or ``cuda`` for all of ``ranks`` processes on this machine; nothing is initialised.

    Raises:
        InputError: as :func:`choose_device`. A job that wants GPUs never falls to the CPU in silence.
    """
    if wanted == "cpu":
        return "cpu"
    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return "cuda"
    if wanted == "auto" and gpus == 0:
        return "cpu"
    fewer = f"launch {gpus} or fewer ranks here, or " if gpus else ""
    raise InputError(
        f"device = {wanted}: every rank needs a GPU of its own: {ranks} rank(s) on this machine, which has {gpus}; "
        f"{fewer}set device=cpu"
    )


def device_name(device: torch.device) -> str:
    """What CUDA calls the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: allocated on its GPU; where it computes on the CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds now: allocated on its GPU; where it computes on the CPU, resident."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes of this machine's own memory that programs may still take."""
    return int(psutil.virtual_memory().available)


def launcher_store(timeout: timedelta = timedelta(minutes=30)) -> dist.Store:
    """The key-value store that the ranks of this job share: the launcher's, or one of its own when started by hand."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"ultrafuser/{name_of_start(store, rank, ranks, timeout)}", store)


@contextmanager
def joined_job(device: torch.device, store: dist.Store, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the job's process group through ``store`` (see :func:`launcher_store`), and leave it at a good end.

    CPU tensors travel by gloo everywhere; on GPUs, where those travel one at a time, CUDA tensors by NCCL. After an
    exception the process group is left as it is: taking it down would make the other ranks fail too, before this one
    could say why.
    """
    backend, bound = IN_ORDER, None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Binding the device makes NCCL communicators eagerly, in the same order on every rank.
        backend, bound = "cpu:gloo,cuda:nccl", device
    dist.init_process_group(
        backend, store=store, rank=launched_rank(), world_size=launched_ranks(), timeout=timeout, device_id=bound
    )
    yield
    dist.barrier()  # rank 0 may still write: launchers like srun end ranks that outlive another for long
    dist.destroy_process_group()
