"""A process that goes on in a copy of this one, where all imports are done: quick where ranks outnumber cores.

A copy has one thread, and for ever the locks that another thread of this process holds: so this one may have no other,
and a launcher's store lives in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from torch.distributed import TCPStore

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_LOOK_EVERY_S = 0.02


def end_with_parent(number: signal.Signals) -> None:
    """Have the system send this process ``number`` when its parent is gone; Linux alone can."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


class StoreElsewhere:
    """What a launcher asks of the :class:`torch.distributed.TCPStore` that it hosts; its process ends with this one.

    Args:
        arguments, options: of the store.

    Attributes:
        port: where it listens.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        readable, writable = os.pipe()
        if os.fork() == 0:
            end_with_parent(signal.SIGKILL)
            os.setsid()
            store = TCPStore(*arguments, **options)
            os.write(writable, str(store.port).encode())
            while True:
                signal.pause()
        os.close(writable)
        self.port = int(os.read(readable, 16))
        os.close(readable)


class Forked:
    """As much of :class:`subprocess.Popen` as a launcher asks for.

    Args:
        main: what ``command`` would come to, as a function of its arguments: the process's code.
        command: interpreter and program, which are this process's own, then arguments.
        env: of the process; None: this one's.
        start_new_session: as there.
        output: for stdout and stderr; None: this process's.
    """

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        output: IO[str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # what comes now is for one of both
        self.pid = os.fork()
        if self.pid == 0:
            self._become(main, command[2:], env, start_new_session, output)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; TimeoutExpired after ``timeout`` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired("", timeout or 0.0)
            time.sleep(_LOOK_EVERY_S)
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @staticmethod
    def _become(
        main: Callable[[Sequence[str]], int],
        arguments: Sequence[str],
        env: Mapping[str, str] | None,
        start_new_session: bool,
        output: IO[str] | None,
    ) -> None:
        code = 1
        try:
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if start_new_session:
                os.setsid()
            if output is not None:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
