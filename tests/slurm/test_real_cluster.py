"""The batch script under a real Slurm: preempted, restarted and out of time, a run ends where an undisturbed one does.

Two nodes x two ranks on this machine; ``make slurm-test`` runs it. One story, since every start of four ranks takes a
while: preemption by a job of a higher partition, a rank that is killed, the time limit, the end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.command import ultrafuser
from support.slurm_cluster import Cluster, missing_programs, slurm_cluster
from support.trio import COLOCATED_TP2, config_tree, read_steps, train

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 120.0  # for one chapter: ranks start slowly where cores are few
STEPS = (3, 21)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"{', '.join(missing_programs())} not found: apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path / "slurm") as running:
        yield running


def configuration(trio: Path, runs: Path) -> dict[str, Any]:
    tree = config_tree(trio, runs, COLOCATED_TP2 | {"dp": 2})
    tree["stage1"] |= {"steps": STEPS[0]}
    tree["stage2"] |= {"steps": STEPS[1]}
    return tree | {"device": "cpu", "name": "disturbed", "checkpoint": {"every": 2}}


class Job:
    """A run that ``ultrafuser slurm --submit`` has given to ``cluster``."""

    def __init__(self, cluster: Cluster, number: str, run_dir: Path, log: Path) -> None:
        self.cluster, self.number, self.run_dir, self.log = cluster, number, run_dir, log

    def steps(self) -> list[int]:
        """Those that are on record."""
        done = (self.run_dir / "metrics.jsonl").is_file()
        return [record["step"] for record in read_steps(self.run_dir)] if done else []

    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + DEADLINE_S
        while not condition():
            alive = self.cluster.state(self.number) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
            assert alive or condition(), f"no {what}: {self.cluster.facts(self.number)}\n{self.said()}"
            assert time.monotonic() < until, f"no {what} in time\n{self.said()}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def ranks(self) -> dict[str, psutil.Process]:
        """Rank -> its process."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            if "ultrafuser_mega.cli.rank" in (process.info["cmdline"] or []):
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]:
                    found[environment["RANK"]] = process
        return found


def submitted(cluster: Cluster, tree: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, said: Any) -> Job:
    (folder / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    for name, value in (cluster.environment | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    cache = ["--cache", folder / "node" / "store", "--python", sys.executable]
    asked = ["--nodes", 2, "--time", "2:00:00", "--partition", "main", "--grace", 60, *cache]
    assert ultrafuser(monkeypatch, "slurm", "--config", "c.yaml", "--submit", *asked) == 0, said.readouterr().err
    number = said.readouterr().out.split()[-1]
    return Job(cluster, number, Path(tree["runs"]) / tree["name"], folder / f"slurm-{tree['name']}-{number}.out")


def test_a_run_that_slurm_preempts_and_stops_ends_where_an_undisturbed_one_does(
    cluster: Cluster,
    trio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = configuration(trio, tmp_path / "runs")
    job = submitted(cluster, tree, tmp_path, monkeypatch, capsys)

    job.wait("first steps", lambda: len(job.steps()) >= 4)
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--wrap=:")
    job.wait("requeue behind a preemption", lambda: cluster.facts(job.number)["Restarts"] == "1")
    preempted = job.steps()[-1]
    assert preempted < sum(STEPS)
    assert cluster.state(urgent) in ("PENDING", "RUNNING", "COMPLETED")

    job.wait("steps behind the preemption", lambda: job.steps()[-1] >= preempted + 2)
    began = list_checkpoints(job.run_dir / "checkpoints")[-1]
    job.ranks()["3"].kill()
    job.wait("restart within the job", lambda: "restart 1: going on from the newest checkpoint" in job.said())
    job.wait("steps behind the restart", lambda: job.steps()[-1] >= preempted + 4)
    assert cluster.facts(job.number)["Restarts"] == "1"

    for rank in job.ranks().values():  # so that the run is not over before Slurm looks at its time
        rank.suspend()
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    job.wait("word of the time limit", lambda: "Warning signal 10" in (cluster.folder / "slurmctld.log").read_text())
    for rank in job.ranks().values():
        rank.resume()
    job.wait("requeue at the time limit", lambda: cluster.facts(job.number)["Restarts"] == "2")
    stopped = job.steps()[-1]
    assert stopped < sum(STEPS), "the run was over before its time"

    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.wait("end", lambda: cluster.state(job.number) == "COMPLETED")

    undisturbed = train(tree | {"name": "undisturbed"}, 4)
    losses = [[(step["step"], step["loss"]) for step in read_steps(run)] for run in (job.run_dir, undisturbed)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, sum(STEPS) + 1))
    said = job.said()
    assert said.count("stopped by a signal: back into the queue") == 2  # the log of all starts
    assert "going on" in said and began is not None
    with capsys.disabled():
        print(f"\npreempted behind step {preempted}, stopped behind {stopped}; the log's notes:")
        print("\n".join(line for line in said.splitlines() if "step " not in line or "stopped" in line)[-6000:])


def test_what_slurm_has_against_a_job_is_one_line(
    cluster: Cluster,
    trio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configuration(trio, tmp_path / "runs")))
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    arguments = ["slurm", "--config", tmp_path / "c.yaml", "--submit", "--nodes", 2]
    assert ultrafuser(monkeypatch, *arguments, "--partition", "nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch: ") and "invalid partition" in error.lower() and error.count("\n") == 1
    assert os.environ["SLURM_CONF"] and signal.SIGUSR1 == 10
