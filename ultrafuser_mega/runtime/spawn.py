"""Run one function on several gloo ranks of this machine and collect what each returned.

Used by the tests and by command-line checks that need a few ranks for a moment. Training is
launched with torchrun instead.
"""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.runtime.gloo import IN_ORDER
from ultrafuser_mega.runtime.quiet import quiet_dependencies


class RankFailure(RuntimeError):  # noqa: N818 (it is the rank that failed, not an error to handle)
    """A spawned rank raised or died; carries the first failing rank's own traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` on ``world_size`` fresh processes joined by a gloo group.

    ``function`` must live at module level (it is pickled by name) and what it returns must be
    picklable. Returns the results in rank order. ``multiprocessing.set_forkserver_preload`` before
    the first call makes all calls faster.

    Raises:
        InputError: a rank raised it.
        RankFailure: a rank raised anything else, died or did not return within ``timeout_s`` seconds.

    All ranks are ended before either is raised.
    """
    # Ranks fork from a server process that has imported what the caller preloads, and nothing else: no threads, no
    # CUDA. Spawning each from scratch would import torch and Megatron-core once per rank.
    context = mp.get_context("forkserver")
    # The ranks meet in a file: a free port found here may be taken by the time they bind it.
    meeting = tempfile.mkdtemp(prefix="ranks-")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    work = pickle.dumps((function, args))  # reading it imports Megatron-core: the rank does that once it is quiet
    ranks = [
        context.Process(target=_rank_main, args=(work, rank, world_size, meeting, timeout_s, pipes[rank][1]))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes], timeout_s)
    finally:
        for process in ranks:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(meeting, ignore_errors=True)


def _collect(receivers: list[Any], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending: dict[Any, int] = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready: list[Any] = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"ranks {sorted(pending.values())} did not finish within {timeout_s:.0f} s")
        for receiver in ready:
            rank = pending[receiver]
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                raise RankFailure(f"rank {rank} died without a word (killed?)") from None
            if isinstance(value, InputError):
                raise value
            if not succeeded:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _rank_main(work: bytes, rank: int, world_size: int, meeting: str, timeout_s: float, sender: Connection) -> None:
    gc.freeze()  # what is imported is no garbage: a collection need not walk through it, nor copy its pages
    quiet_dependencies()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    try:
        function, args = pickle.loads(work)
        dist.init_process_group(
            IN_ORDER,
            init_method=f"file://{meeting}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        value = function(rank, *args)
        dist.barrier()
        # As bytes: tensors sent as objects would stay in shared memory that dies with this process.
        sender.send_bytes(pickle.dumps((True, value)))
        dist.destroy_process_group()
    except BaseException as error:
        said = error if isinstance(error, InputError) else traceback.format_exc()
        sender.send_bytes(pickle.dumps((False, said)))
        raise SystemExit(1) from None
