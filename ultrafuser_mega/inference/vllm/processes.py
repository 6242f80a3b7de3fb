"""The engine processes of all specialists: they start, answer and end together.

Whatever happens to one, the others are ended, and what is raised names the one that was the cause.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import TCPStore

import ultrafuser_mega
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.vllm.messages import Failed, Job, Up
from ultrafuser_mega.inference.vllm.process import HOST

_START_SECONDS = 3600.0  # large models from slow disks; a process that fails is seen at once
_STEP_SECONDS = 600.0
_CAUSE_SECONDS = 3.0  # for the process that others miss to be seen as ended
_END_SECONDS = 5.0


class EngineEndedError(RuntimeError):
    """The engine of a specialist ended, and with it all.

    Attributes:
        number: of the request that was the cause, where one was.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.number = number


class _Process:
    """One of them; it ends when this process does, or closes its standard input."""

    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            package = str(Path(ultrafuser_mega.__file__).parents[1])
            paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ultrafuser_mega.inference.vllm.process", str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
            )
        self.name, self.pid = name, self._process.pid
        self.pipe = Connection(ours.detach())
        self.watch = os.pidfd_open(self.pid)

    def end(self, seconds: float) -> None:
        """Let it end, and make it where it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.pipe.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.watch)

    def told(self) -> Any:
        """What it has to say; Failed where it ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            code = self._process.wait(_END_SECONDS)
            how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code}"
            return Failed(how)


class Processes:
    """The processes of all specialists.

    Args:
        jobs: specialist -> what its process runs; the first one's chooses.

    Attributes:
        up: specialist -> what its process said when its model was loaded.

    Raises:
        InputError: a process does not start for what a person can mend.
        EngineEndedError: one ended otherwise.
    """

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._all: dict[str, _Process] = {}
        try:
            for name in jobs:
                self._all[name] = _Process(name)
            self.up: dict[str, Up] = self.ask(jobs, _START_SECONDS)
            # The engines meet at a store of this process, so that its port is free for certain.
            limit = timedelta(seconds=_STEP_SECONDS)
            self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=limit)
            self.ask(dict.fromkeys(jobs, (self._store.port, _STEP_SECONDS)))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[str, int]:
        """Specialist -> its process."""
        return {name: process.pid for name, process in self._all.items()}

    def close(self) -> None:
        """End all of them. Closed ones stay so."""
        processes, self._all = list(self._all.values()), {}
        for process in processes:
            with contextlib.suppress(OSError):
                process.pipe.close()
        for process in processes:
            process.end(_END_SECONDS)

    def ask(
        self,
        messages: Mapping[str, Any],
        seconds: float = _STEP_SECONDS,
        check: Callable[[str, Any], None] = lambda name, answer: None,
    ) -> dict[str, Any]:
        """Send each its message; what they answer.

        Args:
            messages: for all of them.
            seconds: that they have to answer.
            check: sees every answer as it comes, while others may still wait for what it lacks.

        Raises:
            InputError, EngineEndedError: one ended, or does not answer; all are ended then.
        """
        for name, message in messages.items():
            with contextlib.suppress(OSError):  # it ended: seen when it is waited for
                self._all[name].pipe.send(message)
        answers: dict[str, Any] = {}
        until = time.monotonic() + seconds
        while waited := [self._all[name] for name in messages if name not in answers]:
            for name, answer in self._ready(waited, until - time.monotonic()).items():
                if isinstance(answer, Failed):
                    self._give_up(name, answer)
                check(name, answer)
                answers[name] = answer
        return {name: answers[name] for name in messages}

    def fail(self, message: str, number: int | None = None) -> NoReturn:
        """End all of them for what was seen from here."""
        self.close()
        raise EngineEndedError(message, number)

    def _ready(self, waited: Iterable[_Process], seconds: float) -> dict[str, Any]:
        """Some of what they say."""
        of: dict[Any, _Process] = {handle: process for process in waited for handle in (process.pipe, process.watch)}
        ready = {of[handle] for handle in wait(list(of), max(seconds, 0))}
        if not ready:
            names = ", ".join(dict.fromkeys(process.name for process in of.values()))
            self.fail(f"the vLLM engine of {names} gave no answer in {seconds:.0f} s")
        return {process.name: process.told() for process in ready}

    def _give_up(self, name: str, failed: Failed) -> NoReturn:
        """Raise for the first cause: not for one that misses another, while there is such another."""
        causes = {name: failed}
        until = time.monotonic() + _CAUSE_SECONDS
        while failed.lost and len(causes) < len(self._all) and (left := until - time.monotonic()) > 0:
            others = [process for other, process in self._all.items() if other not in causes]
            of: dict[Any, _Process] = {
                handle: process for process in others for handle in (process.pipe, process.watch)
            }
            for process in {of[handle] for handle in wait(list(of), left)}:
                answer = process.told()
                if isinstance(answer, Failed):
                    causes[process.name] = answer
                    name, failed = (name, failed) if answer.lost else (process.name, answer)
        self.close()
        if failed.told:
            raise InputError(failed.message)
        raise EngineEndedError(f"the vLLM engine of {name}: {failed.message}", failed.number)
