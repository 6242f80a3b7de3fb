"""The sandbox ``bwrap``: bubblewrap, without privileges.

Inside there is no network, nothing of this machine's files but its programs and Python, read-only, one small /tmp in
memory, no capabilities, no other process; memory, CPU, files and time are limited, and a seccomp filter refuses new
processes where its numbers are known. When time is over, or this process dies, all of it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import IO

from ultrafuser_mega.evaluation.sandbox import Limits, Running, Sandbox, python_command
from ultrafuser_mega.evaluation.seccomp import program_filter


class Bubblewrap(Sandbox):
    """Debian's, Fedora's or anyone's ``bwrap`` on the PATH."""

    name = "bwrap"
    help = "install bubblewrap (apt install bubblewrap), or leave out benchmarks that run code"

    def missing(self) -> str | None:
        if sys.platform != "linux":
            return f"bubblewrap needs Linux, this is {sys.platform}"
        return None if shutil.which("bwrap") else "no bwrap on the PATH"

    def start(
        self, source: str, limits: Limits, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> Running:
        # The interpreter behind a virtual environment, whose own folder is not to be seen.
        command = python_command(str(Path(sys.executable).resolve()), source, limits)
        rules = program_filter()
        with tempfile.TemporaryFile() as filter_file:
            guarded: list[str] = []
            if rules is not None:
                filter_file.write(rules)
                filter_file.seek(0)
                guarded = ["--seccomp", str(filter_file.fileno())]
            process = subprocess.Popen(
                ["bwrap", *_isolation(limits), *guarded, "--", *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[filter_file.fileno()],
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )
        return Running(process, lambda: None)  # its PID namespace ends with it


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
