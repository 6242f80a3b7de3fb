"""Where programs that a model wrote run: bubblewrap, or not at all.

Inside there is no network, nothing of this machine's files but its programs and Python, read-only, one small /tmp in
memory, no capabilities, no other process; memory, CPU, files and time are limited (:class:`Limits`), and a seccomp
filter refuses new processes where its numbers are known. When time is over, or this process dies, all of it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.evaluation.seccomp import program_filter

_HELP = "install bubblewrap (apt install bubblewrap), or leave out benchmarks that run code"


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


def start_in_sandbox(
    source: str,
    descriptors: Sequence[int],
    limits: Limits,
    stdin: IO[bytes] | int,
    stdout: IO[bytes] | int,
    stderr: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start this Python on ``source`` (a program's text), with the standard library and nothing else.

    Whoever starts it has asked :func:`check_sandbox` before, and ends it: :func:`end`.

    Args:
        source: what runs.
        descriptors: open files that it gets, too; their numbers are its sys.argv[1:].
        limits: its.
        stdin: where it reads.
        stdout: where it writes.
        stderr: where it complains.
    """
    # The interpreter behind a virtual environment, whose own folder is not to be seen.
    program = [str(Path(sys.executable).resolve()), "-I", "-S", "-c", _LIMITING + source]
    given = [f"{limits.cpu_seconds},{limits.memory_bytes},{limits.file_bytes}", *map(str, descriptors)]
    rules = program_filter()
    with tempfile.TemporaryFile() as filter_file:
        guarded: list[str] = []
        if rules is not None:
            filter_file.write(rules)
            filter_file.seek(0)
            guarded = ["--seccomp", str(filter_file.fileno())]
        return subprocess.Popen(
            ["bwrap", *_isolation(limits), *guarded, "--", *program, *given],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[filter_file.fileno(), *descriptors],
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", os.defpath)},
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a sandbox with all that is in it."""
    process.kill()  # its PID namespace goes with it
    process.wait()


@cache
def check_sandbox() -> None:
    """InputError where no program can be run apart from this machine, in one line that says what would help."""
    if sys.platform != "linux":
        raise InputError(f"code sandbox: bubblewrap needs Linux, this is {sys.platform}; {_HELP}")
    if shutil.which("bwrap") is None:
        raise InputError(f"code sandbox: no bwrap on the PATH; {_HELP}")
    with tempfile.TemporaryFile() as said:
        process = start_in_sandbox("print('ready')", (), Limits(), subprocess.DEVNULL, said, stderr=subprocess.PIPE)
        try:
            _, problem = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            end(process)
            raise InputError("code sandbox: bwrap did not start a program within 60 s") from None
        said.seek(0)
        if said.read() != b"ready\n":
            reason = " ".join(problem.decode(errors="replace").split()) or f"exit code {process.returncode}"
            raise InputError(f"code sandbox: bwrap starts nothing here ({reason[-300:]}); {_HELP}")


#: Begins every program: it cannot take its own limits back without the capability to.
_LIMITING = """
import resource as _r, sys as _s
_cpu, _memory, _file = map(int, _s.argv.pop(1).split(","))
for _what, _most in ((_r.RLIMIT_CPU, _cpu), (_r.RLIMIT_AS, _memory), (_r.RLIMIT_FSIZE, _file), (_r.RLIMIT_CORE, 0),
                     (_r.RLIMIT_NOFILE, 64)):
    _r.setrlimit(_what, (_most, _most))
del _r, _s, _cpu, _memory, _file, _what, _most
"""


def _isolation(limits: Limits) -> list[str]:
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    options += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"]
    options += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"]
    options += ["--setenv", "PYTHONHASHSEED", "0", "--setenv", "LC_ALL", "C.UTF-8"]
    for folder in ("/usr", "/bin", "/lib", "/lib64", "/lib32"):
        if Path(folder).is_symlink():
            options += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).exists():
            options += ["--ro-bind", folder, folder]
    for folder in _python_folders():
        options += ["--ro-bind", folder, folder]
    options += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return [*options, "--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]


def _python_folders() -> list[str]:
    """What Python itself needs of this machine, where /usr does not hold it."""
    paths = sysconfig.get_paths(vars={"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    needed = {sys.base_prefix, sys.base_exec_prefix, paths["stdlib"], paths["platstdlib"]}
    needed.add(str(Path(sys.executable).resolve().parent))
    folders = sorted({str(Path(folder).resolve()) for folder in needed})
    held = [folder for folder in folders if not Path(folder).is_relative_to("/usr")]
    return [f for f in held if not any(f != other and Path(f).is_relative_to(other) for other in held)]
