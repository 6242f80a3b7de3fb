"""A job of three processes that a launcher like srun starts: its exit codes and what people read of it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

RANKS = 3
# Generous: a job that hangs would wait for half an hour. None of what runs here takes more than a few seconds.
DEADLINE_S = 60.0


def launch(function: Callable[..., Any], folder: Path, *args: Any) -> tuple[list[int | None], str]:
    """Start RANKS processes as a launcher like srun does; returns their exit codes and what they wrote to stderr."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = folder / "stderr"
    ranks: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(function, rank, port, errors, args)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()  # does nothing to one that has ended
    return codes, errors.read_text()


def _rank_main(function: Callable[..., Any], rank: int, port: int, errors: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with errors.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(function(*args))
