"""A training job on this machine: one process per rank, all of which end with the first that fails.

What torchrun does on one machine, but for the end. The line that says why is the last one, and the exit code is the
failing rank's (2: bad input, 3: divergence, 1: otherwise). A signal is passed on: the ranks finish their step, write a
checkpoint and end with a code of their own (see training/stopping.py); a second one ends them at once, as SIGQUIT does,
and then the code is 128 + its number. So it is where a rank fails on the way to that checkpoint which would else be
started again: who asked is told that it ended, not that it is broken.

A rank that was killed, ran into a defect or hung may be started again with all others: the run goes on from its newest
checkpoint, with fewer ranks where the machine has lost some. What would only come again (bad input, divergence) is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from torch.distributed import TCPStore

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_GO_ON

_HOST = "127.0.0.1"
_LOOK_EVERY_S = 0.1
#: What is passed on, and as what: a closed terminal asks for the same as SIGTERM.
_REQUESTS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
_STOPPED = (EXIT_GO_ON, 128 + signal.SIGINT)  # behind a checkpoint, because a signal asked for it
_HINTS: dict[int, str] = {
    signal.SIGKILL: " (by the system, when memory runs out)",
    signal.SIGBUS: " (a file that it reads from has become shorter, as of the token store, or its disk fails)",
}
_AGAIN = "--resume goes on"
_UNTIL_KILLED_S = 3.0  # of ranks that SIGTERM does not end: one that hangs, or waits for one


def launch_local(
    ranks: int,
    program: Sequence[str],
    way_on: Callable[[str], str],
    max_restarts: int = 0,
    ranks_left: Callable[[], int] | None = None,
) -> int:
    """Run ``ranks`` processes of ``python program...``; returns the job's exit code when all are gone.

    Args:
        ranks: processes to start.
        program: what each runs, arguments included; says by itself why it fails
            (:func:`ultrafuser_mega.runtime.failure.first_failure_ends_job`), and goes on by itself with a run that this
            launch has begun (:func:`ultrafuser_mega.launch.rank.resumes`).
        way_on: what the last line says of how the job is gone on with, from a beginning of the sentence: see
            :func:`from_checkpoints`.
        max_restarts: how often all ranks are started anew when one has failed.
        ranks_left: how many of them a restart may have; None: all.

    Raises:
        InputError: there are too few left to go on with.
    """
    sys.stdout.flush()
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)  # hosted here: it outlives any rank
    launch, attempt = uuid.uuid4().hex, 0
    with tempfile.TemporaryDirectory(prefix="ultrafuser-") as errors, _heard() as heard:
        while True:
            where = {"TORCHELASTIC_RUN_ID": launch, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
            job = _Job(ranks, program, where | {"MASTER_PORT": str(store.port)}, Path(errors))
            try:
                failed = job.wait(heard)
            finally:
                job.end()
            if failed is None:
                return 0
            said, again = job.has_said_why(failed), attempt < max_restarts and job.is_worth_a_restart(failed)
            number = heard[-1] if heard else job.request_to(failed)
            if number and (again or not said):  # what a restart would be for ended it on the way to its checkpoint
                return _ended_by(number, way_on)
            if again:
                attempt += 1
                what = "" if said else f"failed: {job.what_became_of(failed)}; "
                before, ranks = ranks, ranks if ranks_left is None else ranks_left()
                fewer = f" on {ranks} of {before} ranks" if ranks < before else ""
                _say(f"{what}restart {attempt} of {max_restarts}{fewer}: {way_on('going on')}")
                continue
            if not said:
                _say(f"failed: {job.what_became_of(failed)}; {way_on(_AGAIN)}")
            return max(job.codes[failed], 1)


def from_checkpoints(run_dir: Path) -> Callable[[str], str]:
    """What ``launch_local`` says of a training run: the newest checkpoint in its folder."""

    def way_on(beginning: str) -> str:
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        return f"{beginning} from {checkpoints[-1][1]}" if checkpoints else "the run has no checkpoint yet"

    return way_on


class _Job:
    """The processes of one attempt.

    codes: rank -> its exit code, of those that have ended.
    """

    def __init__(self, ranks: int, program: Sequence[str], environment: dict[str, str], errors: Path) -> None:
        self.codes: dict[int, int] = {}
        self._files = {rank: errors / f"{environment['TORCHELASTIC_RESTART_COUNT']}.{rank}" for rank in range(ranks)}
        self._processes = {
            rank: subprocess.Popen(
                [sys.executable, *program],
                env=os.environ | _environment(rank, ranks) | environment | {"TORCHELASTIC_ERROR_FILE": str(file)},
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which passes it on
            )
            for rank, file in self._files.items()
        }

    def wait(self, heard: list[signal.Signals]) -> int | None:
        """Until all have ended well (None), one has failed (its rank) or two signals were heard (any rank)."""
        passed_on = False
        while True:
            if (failed := self._look()) is not None:
                if self.codes[failed] in _STOPPED:  # all of them do
                    self._until_ended(_UNTIL_KILLED_S)
                return failed
            if len(self.codes) == len(self._processes):
                return None
            if len(heard) > 1 or (heard and heard[0] not in _REQUESTS):
                self._send(signal.SIGKILL)
                self._until_ended(_UNTIL_KILLED_S)
                return self._look() or 0
            if heard and not passed_on:
                self._send(_REQUESTS[heard[0]])
                passed_on = True
            time.sleep(_LOOK_EVERY_S)

    def end(self) -> None:
        """End what still runs, children of ranks that are gone included."""
        self._send(signal.SIGTERM)
        self._until_ended(_UNTIL_KILLED_S)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        Console(stderr=True).show_cursor()  # the progress display hid it

    def has_said_why(self, rank: int) -> bool:
        """Whether a rank that failed could still say so."""
        return self.codes.get(rank, 0) > 0 and self._files[rank].is_file()

    def is_worth_a_restart(self, rank: int) -> bool:
        """Whether what ended a rank need not come again."""
        return self.codes[rank] not in (EXIT_BAD_INPUT, EXIT_DIVERGED, *_STOPPED)

    def request_to(self, rank: int) -> signal.Signals | None:
        """The request that ended a rank before it listened, if one did."""
        return next((number for number in _REQUESTS if number == -self.codes[rank]), None)

    def what_became_of(self, rank: int) -> str:
        """For people."""
        code = self.codes[rank]
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {rank} of {len(self._processes)} {what}{_HINTS.get(-code, '')}"

    def _look(self) -> int | None:
        """Note who has ended; the rank that failed, if any has: rather one that was killed than one that missed it."""
        self.codes = {rank: code for rank, p in self._processes.items() if (code := p.poll()) is not None}
        failed = [rank for rank, code in self.codes.items() if code]
        return min(failed, key=lambda rank: (self.codes[rank] > 0, rank), default=None)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def _until_ended(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))


@contextmanager
def _heard() -> Iterator[list[signal.Signals]]:
    """The signals that come meanwhile, as they come; none ends this process. Those it ignored are still ignored."""
    heard: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in (*_REQUESTS, signal.SIGQUIT)}
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number)))
    try:
        yield heard
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _environment(rank: int, ranks: int) -> dict[str, str]:
    """What torchrun tells a rank, as far as anything here or in torch asks for it."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _HOST,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:  # as torchrun: the ranks share the cores
        environment["OMP_NUM_THREADS"] = "1"
    return environment


def _ended_by(number: signal.Signals, way_on: Callable[[str], str]) -> int:
    what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    _say(f"{what} at once; {way_on(_AGAIN)}")
    return 128 + number


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
