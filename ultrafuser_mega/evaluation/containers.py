"""The sandbox ``docker``: one container to a program, of an image with this Python's version.

Inside there is no network, the image's files read-only, one small /tmp in memory, an unprivileged user, no capabilities
and none to be had, Docker's own seccomp filter; memory, processes, CPU, files and time are limited. Other than in
bubblewrap a program may start processes, a few, and what it starts ends with the container.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from typing import IO

from ultrafuser_mega.evaluation.sandbox import Limits, Running, Sandbox, last_words, python_command, run_quietly

IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
_PROCESSES = 64


class Docker(Sandbox):
    """The daemon that ``docker`` on the PATH speaks to."""

    name = "docker"
    help = "start Docker, use --code-sandbox bwrap, or leave out benchmarks that run code"

    def missing(self) -> str | None:
        if shutil.which("docker") is None:
            return "no docker on the PATH"
        code, said = run_quietly(["docker", "version", "--format", "{{.Server.Version}}"], 20)
        if code:
            return f"no Docker daemon answers ({last_words(said, f'exit code {code}')})"
        if run_quietly(["docker", "image", "inspect", IMAGE], 20)[0]:
            return f"Docker has no image {IMAGE}: docker pull {IMAGE}"
        return None

    def start(
        self, source: str, limits: Limits, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> Running:
        name = f"ultrafuser-{uuid.uuid4().hex}"
        process = subprocess.Popen(
            ["docker", "run", "--name", name, *_isolation(limits), IMAGE, *python_command("python3", source, limits)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

        def stop() -> None:
            if process.poll() is None:  # the client's end alone would leave the container
                run_quietly(["docker", "kill", name], 60)

        return Running(process, stop)


def _isolation(limits: Limits) -> list[str]:
    options = ["--rm", "--interactive", "--pull", "never", "--log-driver", "none"]
    options += ["--network", "none", "--ipc", "none", "--hostname", "sandbox", "--user", "65534:65534"]
    options += ["--read-only", "--tmpfs", f"/tmp:size={limits.file_bytes},mode=1777", "--workdir", "/tmp"]
    options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--cpus", "1"]
    options += ["--memory", str(limits.memory_bytes), "--memory-swap", str(limits.memory_bytes)]
    options += ["--pids-limit", str(_PROCESSES)]
    return [*options, "--env", "HOME=/tmp", "--env", "PYTHONHASHSEED=0", "--env", "LC_ALL=C.UTF-8"]
