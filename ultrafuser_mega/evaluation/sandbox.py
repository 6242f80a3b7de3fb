"""Where programs that a model wrote run: apart from this machine, or not at all, unless a person has said so twice.

A sandbox starts this or another Python on a program's text and hands back a :class:`Running`; its three streams are
all that leads in or out. ``bwrap`` (bubblewrap.py) is the default; ``docker`` (containers.py) does where one may not
make namespaces; ``none`` here is no sandbox: the limits hold, and nothing else does.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, ClassVar

from ultrafuser_mega.errors import InputError

#: Asked one after the other before programs run without a sandbox; {user} is who runs them.
QUESTIONS = (
    "Without a sandbox, programs that models wrote run as {user}, with all that {user} may do: read, change and delete "
    "files, and use the network. Run them so?",
    "Nothing of that can be undone. May this machine lose every file and key that {user} can reach?",
)


@dataclass(frozen=True)
class Limits:
    """Of one program.

    seconds: by the clock, the start included.
    cpu_seconds: of the processor.
    memory_bytes: of address space.
    file_bytes: of one file, and of /tmp as a whole.
    """

    seconds: float = 10.0
    cpu_seconds: int = 8
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20


class Running:
    """A program in a sandbox.

    Args:
        process: that leads to it.
        stop: ends all that is in the sandbox.
    """

    def __init__(self, process: subprocess.Popen[bytes], stop: Callable[[], None]) -> None:
        self._process = process
        self._stop = stop

    def wait(self, seconds: float) -> None:
        """Until it has ended; subprocess.TimeoutExpired where it has not by then."""
        self._process.wait(seconds)

    def end(self) -> None:
        """With all that is in the sandbox."""
        self._stop()
        self._process.kill()
        self._process.wait()


class Sandbox(ABC):
    """A way to run Python programs that nobody trusts.

    Attributes:
        name: on the command line and in results.
        help: what to do where it is not to be had.
    """

    name: ClassVar[str]
    help: ClassVar[str]

    @abstractmethod
    def start(
        self, source: str, limits: Limits, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> Running:
        """Start Python on ``source`` (a program's text), with the standard library and nothing else.

        Whoever starts it has asked :meth:`check` before, and ends it.
        """

    def check(self) -> None:
        """InputError where no program can be run so, in one line that says what would help."""
        _check(self)

    def refusal(self, reason: str) -> InputError:
        """``reason``, with what would help."""
        return InputError(f"code sandbox: {reason}; {self.help}")

    def missing(self) -> str | None:
        """Why there is no such sandbox here, as far as can be told without starting one."""
        return None


class Unsandboxed(Sandbox):
    """No sandbox: only limits on memory, CPU, time and file size; see :func:`confirmed_twice`."""

    name = "none"
    help = "leave out benchmarks that run code"

    def start(
        self, source: str, limits: Limits, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> Running:
        with tempfile.TemporaryDirectory() as empty:  # gone when the program runs: what it writes beside itself fails
            command = python_command(sys.executable, source, limits)
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                cwd=empty,
                env=plain_environment(),
            )

        def stop() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        return Running(process, stop)


def open_sandbox(name: str, ask: Callable[[str], bool]) -> Sandbox:
    """The sandbox that ``--code-sandbox`` names, which works.

    Args:
        name: bwrap, docker or none.
        ask: puts a question to the person and says whether the answer is yes; asked for "none" only.

    Raises:
        InputError: there is none of that name, it does not work here, or the person has not agreed twice.
    """
    from ultrafuser_mega.evaluation.bubblewrap import Bubblewrap
    from ultrafuser_mega.evaluation.containers import Docker

    kinds: dict[str, type[Sandbox]] = {kind.name: kind for kind in (Bubblewrap, Docker, Unsandboxed)}
    if name not in kinds:
        raise InputError(f"--code-sandbox {name!r}: choose of {', '.join(kinds)}")
    if name == Unsandboxed.name:
        confirmed_twice(ask)
    sandbox = kinds[name]()
    sandbox.check()
    return sandbox


def confirmed_twice(ask: Callable[[str], bool]) -> None:
    """InputError unless both questions are answered with yes."""
    for question in QUESTIONS:
        if not ask(question.format(user=getpass.getuser())):
            raise InputError("--code-sandbox none: not agreed to; use bwrap, or leave out benchmarks that run code")


def python_command(program: str, source: str, limits: Limits) -> list[str]:
    """Python on a text that limits itself first: without site-packages, the user's settings or the current folder."""
    given = f"{limits.cpu_seconds},{limits.memory_bytes},{limits.file_bytes}"
    return [program, "-I", "-S", "-c", _LIMITING + source, given]


def plain_environment() -> dict[str, str]:
    """Of a program that is to know nothing of this process's."""
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def last_words(said: bytes, otherwise: str) -> str:
    """The end of what a program complained of, in one line."""
    return " ".join(said.decode(errors="replace").split())[-300:] or otherwise


def run_quietly(command: Sequence[str], seconds: float) -> tuple[int, bytes]:
    """(exit code, what it said) of a command of this machine; (-1, why) where it does not end in time."""
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error).encode()
    return done.returncode, done.stdout + done.stderr


@cache
def _works(kind: type[Sandbox], path: str) -> str:
    """Why no program starts in such a sandbox; "" where one does. Tried once for each PATH."""
    sandbox = kind()
    if (reason := sandbox.missing()) is not None:
        return reason
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as problem:
        running = sandbox.start("print('ready')", Limits(), subprocess.DEVNULL, said, problem)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            return f"{kind.name} did not start a program within 60 s"
        finally:
            running.end()
        said.seek(0)
        problem.seek(0)
        if said.read() != b"ready\n":
            return f"{kind.name} starts nothing here ({last_words(problem.read(), 'it says nothing')})"
    return ""


def _check(sandbox: Sandbox) -> None:
    if reason := _works(type(sandbox), os.environ.get("PATH", "")):
        raise sandbox.refusal(reason)


#: Begins every program: it cannot take its own limits back without the capability to.
_LIMITING = """
import resource as _r, sys as _s
_cpu, _memory, _file = map(int, _s.argv.pop(1).split(","))
for _what, _most in ((_r.RLIMIT_CPU, _cpu), (_r.RLIMIT_AS, _memory), (_r.RLIMIT_FSIZE, _file), (_r.RLIMIT_CORE, 0),
                     (_r.RLIMIT_NOFILE, 64)):
    _r.setrlimit(_what, (_most, _most))
del _r, _s, _cpu, _memory, _file, _what, _most
"""
