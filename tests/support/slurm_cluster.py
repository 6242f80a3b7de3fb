"""A real Slurm on this machine for the length of a test: munged, slurmctld, two slurmd; no cgroups, no database.

Debian: ``apt-get install slurm-wlm munge``. It runs as whoever runs the test, in a folder and on ports of its own. What
it has started ends with it: the daemons, and all that carries the name of its configuration.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve without an entry in /etc/hosts
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_PATIENCE_S = 30.0

# A requeued job waits for cred_expire seconds, by default 120; Slurm takes no less than 5.
_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
FirstJobId={first}
MpiDefault=none
SwitchType=switch/none
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing_programs() -> list[str]:
    """Of those that a cluster takes, what this machine has not."""
    return [name for name in NEEDED if shutil.which(name, path=_PATH) is None]


@dataclass(frozen=True)
class Cluster:
    """A running one; ``environment`` has its commands find it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: object) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            [*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """All that Slurm says about a job: JobState, Restarts, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def update(self, **values: object) -> None:
        """``scontrol update``, as an administrator does."""
        self.run("scontrol", "update", *(f"{key}={value}" for key, value in values.items()))

    def processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Those of its jobs, with their environments."""
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):  # gone meanwhile, or another user's
                environment = process.environ()
                of_a_job = process.info["name"] == "slurmstepd" or "SLURM_JOB_ID" in environment
                if of_a_job and environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process, environment

    def last_words(self) -> str:
        """Of all daemons."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs)


@contextmanager
def slurm_cluster(cpus: int = 2) -> Iterator[Cluster]:
    """Two nodes of ``cpus`` cores each; partitions ``main``, the default, and ``urgent``, which preempts it."""
    with ExitStack() as stack:
        # Short: the path of a socket may have 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        cluster = Cluster(folder, {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")})
        _write_configuration(folder, cpus)
        stack.callback(_end_jobs, cluster)  # when no daemon is left that could start another
        munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={folder}/munge/key"]
        munged += [f"--{what}-file={folder}/munge/{what}" for what in ("pid", "seed", "log")]
        stack.enter_context(_daemon(cluster, "munged", [*munged, f"--socket={folder}/munge/socket"]))
        _wait_for((folder / "munge" / "socket").exists, cluster, "munged's socket")
        stack.enter_context(_daemon(cluster, "slurmctld", ["slurmctld", "-D", "-c"]))
        for node in NODES:
            stack.enter_context(_daemon(cluster, f"slurmd{node}", ["slurmd", "-D", "-N", node]))
        _wait_for(lambda: _states(cluster) == {"idle"}, cluster, "two idle nodes")
        yield cluster


def _write_configuration(folder: Path, cpus: int) -> None:
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    control, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus} RealMemory=1000"
        for name, port in zip(NODES, ports, strict=True)
    )
    for part in ("munge", "state", *(f"spool{name}" for name in NODES)):
        (folder / part).mkdir(mode=0o700)
    # Numbers of jobs that other clusters on this machine are unlikely to give: ports of their ranks hang on them.
    values = {"host": host, "user": user, "folder": folder, "control": control, "first": control, "nodes": nodes}
    (folder / "slurm.conf").write_text(_CONF.format(**values))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)


@contextmanager
def _daemon(cluster: Cluster, name: str, command: list[str]) -> Iterator[None]:
    with (cluster.folder / f"{name}.out").open("w") as output:
        process = subprocess.Popen(
            command, env=cluster.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            process.wait()


def _end_jobs(cluster: Cluster) -> None:
    until = time.monotonic() + _PATIENCE_S
    while left := [process for process, _ in cluster.processes()]:
        assert time.monotonic() < until, f"{left} do not end"
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _states(cluster: Cluster) -> set[str]:
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, timeout=60, check=False
    )
    return set(done.stdout.split())


def _wait_for(condition: Callable[[], bool], cluster: Cluster, what: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"no {what} after {_PATIENCE_S:.0f} s\n{cluster.last_words()}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("0.0.0.0", 0))
        return [one.getsockname()[1] for one in sockets]
