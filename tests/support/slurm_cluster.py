"""A real Slurm on this machine for the length of a test: munged, slurmctld, two slurmd; no cgroups, no database.

Debian: ``apt-get install slurm-wlm munge``. Everything lies in one folder and on ports of its own; what is started here
is ended by its process id.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve without an entry in /etc/hosts
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
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
MpiDefault=none
SwitchType=switch/none
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
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
            [*map(str, command)], env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        return self.facts(job)["JobState"]

    def facts(self, job: str) -> dict[str, str]:
        """All that Slurm says about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The daemons' last words."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm_cluster(folder: Path, cpus: int = 2) -> Iterator[Cluster]:
    """Two nodes of ``cpus`` cores each; partitions ``main``, the default, and ``urgent``, which preempts it."""
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus} RealMemory=2000"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    for part in ("munge", "state", *(f"spool{name}" for name in NODES)):
        (folder / part).mkdir(parents=True, mode=0o700)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, user=user, folder=folder, control=ports[0], nodes=nodes))
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(conf)}
    cluster = Cluster(folder, environment)
    munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"]
    munged += [f"--{what}-file={folder}/munge/{what}" for what in ("pid", "seed", "log")]
    with ExitStack() as daemons:
        for command in (
            [*munged, f"--socket={folder}/munge/socket"],
            ["slurmctld", "-D", "-c", "-f", str(conf)],
            *(["slurmd", "-D", "-f", str(conf), "-N", name] for name in NODES),
        ):
            daemons.enter_context(_daemon(command, cluster))
            if command[0] == "munged":
                _wait_for((folder / "munge" / "socket").exists, cluster, "munged's socket")
        _wait_for(lambda: _states(cluster) == {"idle"}, cluster, "two idle nodes")
        yield cluster


@contextmanager
def _daemon(command: list[str], cluster: Cluster) -> Iterator[None]:
    name = f"{command[0]}{command[-1] if command[0] == 'slurmd' else ''}"
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


def _states(cluster: Cluster) -> set[str]:
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, timeout=30, check=False
    )
    return set(done.stdout.split())


def _wait_for(condition: object, cluster: Cluster, what: str) -> None:
    until = time.monotonic() + 30
    assert callable(condition)
    while not condition():
        assert time.monotonic() < until, f"no {what} after 30 s\n{cluster.logs()}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("0.0.0.0", 0))
        return [one.getsockname()[1] for one in sockets]
