"""A training job on this machine: one process per rank, all of which end with the first that fails or with a signal.

What torchrun does on one machine, by its own building blocks, but for the end: the line that says why is the last one,
and the exit code is the failing rank's (2: bad input, 3: divergence, 1: otherwise) or 128 + the signal's number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints

_HOST = "127.0.0.1"
_LOOK_EVERY_S = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # those that end a job
_UNTIL_KILLED_S = 10  # of a rank that SIGTERM does not end


def launch_local(ranks: int, program: Sequence[str], run_dir: Path) -> int:
    """Run ``ranks`` processes of ``python program...``; returns the job's exit code when all are gone.

    Args:
        ranks: processes to start.
        program: what each runs, arguments included; says by itself why it fails
            (:func:`ultrafuser_mega.runtime.failure.first_failure_ends_job`).
        run_dir: of the run, whose newest checkpoint the last line names.
    """
    # The elastic library's account of what it does to which process is not for the users of this command.
    log = logging.getLogger("torch.distributed.elastic")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    sys.stdout.flush()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)  # hosted here: it outlives any rank
    with tempfile.TemporaryDirectory(prefix="ultrafuser-") as logs:
        processes = start_processes(
            "rank",
            sys.executable,
            {rank: tuple(program) for rank in range(ranks)},
            {rank: _environment(rank, ranks, store.port) for rank in range(ranks)},
            DefaultLogsSpecs(log_dir=logs),
        )
        try:
            ended = processes.wait(period=_LOOK_EVERY_S)
        except SignalException as end:
            return _signalled(end.sigval, processes, run_dir)
        finally:
            _end(processes)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        assert ended is not None  # waited for without a time limit
        return _failed(ended.failures, ranks, run_dir) if ended.is_failed() else 0


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, as far as anything here or in torch asks for it."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:  # as torchrun: the ranks share the cores
        environment["OMP_NUM_THREADS"] = "1"
    return environment


def _end(processes: PContext) -> None:
    """End what still runs, children of ranks that are gone included.

    Further signals change nothing meanwhile: they would leave processes behind.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    processes.close(signal.SIGTERM, _UNTIL_KILLED_S)
    for group in processes.pids().values():  # every rank leads a process group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    Console(stderr=True).show_cursor()  # the progress display hid it


def _signalled(number: signal.Signals, processes: PContext, run_dir: Path) -> int:
    _end(processes)
    what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    print(f"{what}; {_way_on(run_dir)}", file=sys.stderr, flush=True)
    return 128 + number


def _failed(failures: Mapping[int, ProcessFailure], ranks: int, run_dir: Path) -> int:
    """Exit code of the rank that failed first; says what became of it where it could not."""
    rank, first = next(iter(failures.items()))
    if Path(first.error_file).is_file():
        return first.exitcode
    what = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with exit code {first.exitcode}"
    hint = " (by the system, when memory runs out)" if first.exitcode == -signal.SIGKILL else ""
    print(f"failed: rank {rank} of {ranks} {what}{hint}; {_way_on(run_dir)}", file=sys.stderr, flush=True)
    return max(first.exitcode, 1)


def _way_on(run_dir: Path) -> str:
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    return f"--resume goes on from {checkpoints[-1][1]}" if checkpoints else "the run has no checkpoint yet"
