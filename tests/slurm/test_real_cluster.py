"""The batch script under a real Slurm: whatever befalls it, a run ends where an undisturbed one does.

Two nodes x two ranks on this machine; ``make slurm-test`` runs it. One story, since every start of four ranks takes a
while: preemption by a job of a higher partition, a rank that is killed, the time limit, the end on one node of the two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.command import ultrafuser
from support.slurm_cluster import NODES, Cluster, missing_programs, slurm_cluster
from support.trio import COLOCATED_TP2, config_tree, read_steps, train

PROJECT = Path(__file__).parents[2]
DEADLINE_S = 180.0  # for one chapter: ranks start slowly where cores are few
STEPS = (3, 45)
LAST = sum(STEPS)

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"{', '.join(missing_programs())} not found: apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with slurm_cluster() as running:
        for name, value in (running.environment | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}).items():
            monkeypatch.setenv(name, value)
        yield running


def configuration(trio: Path, runs: Path) -> dict[str, Any]:
    tree = config_tree(trio, runs, COLOCATED_TP2 | {"dp": 2})
    tree["layouts"] += [COLOCATED_TP2]  # for one node
    tree["stage1"] |= {"steps": STEPS[0]}
    tree["stage2"] |= {"steps": STEPS[1]}
    return tree | {"device": "cpu", "name": "disturbed", "checkpoint": {"every": 5}}


class Job:
    """A run that ``ultrafuser slurm --submit`` has given to ``cluster``."""

    def __init__(self, cluster: Cluster, number: str, run_dir: Path, log: Path) -> None:
        self.cluster, self.number, self.run_dir, self.log = cluster, number, run_dir, log

    @property
    def step(self) -> int:
        """The last that is on record; 0: none is."""
        steps = read_steps(self.run_dir) if (self.run_dir / "metrics.jsonl").is_file() else []
        return int(steps[-1]["step"]) if steps else 0

    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def is_requeued(self, times: int) -> bool:
        facts = self.cluster.facts(self.number)
        return facts["Restarts"] == str(times) and facts["JobState"] == "PENDING"

    def wait(self, what: str, condition: Callable[[], bool]) -> float:
        """Until ``condition``; how many seconds that took."""
        began = time.monotonic()
        while not condition():
            facts = self.cluster.facts(self.number)
            alive = facts["JobState"] in ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED", "PREEMPTED")
            in_time = time.monotonic() - began < DEADLINE_S
            assert (alive and in_time) or condition(), f"no {what}: {facts}\n{self.said()}\n{self.cluster.last_words()}"
            time.sleep(0.2)
        return time.monotonic() - began

    def ranks(self) -> dict[str, psutil.Process]:
        """Rank -> its process."""
        return {
            environment["RANK"]: process for process, environment in self.cluster.processes() if "RANK" in environment
        }


def running_minutes(job: Job) -> int:
    hours, minutes, _ = job.cluster.facts(job.number)["RunTime"].split(":")
    return 60 * int(hours) + int(minutes)


def submitted(cluster: Cluster, tree: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, said: Any) -> Job:
    (folder / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    monkeypatch.chdir(folder)
    asked = ["--nodes", "1-2", "--ranks-per-node", 2, "--time", "2:00:00", "--partition", "main", "--grace", 3600]
    own = ["--cache", folder / "node" / "store", "--python", sys.executable, "--sbatch=--nodes=2"]  # one may be lost
    assert ultrafuser(monkeypatch, "slurm", "--config", "c.yaml", "--submit", *asked, *own) == 0, said.readouterr().err
    number = said.readouterr().out.split()[-1]
    return Job(cluster, number, Path(tree["runs"]) / tree["name"], folder / f"slurm-{tree['name']}-{number}.out")


def test_a_run_that_slurm_preempts_stops_and_takes_a_node_from_ends_where_an_undisturbed_one_does(
    cluster: Cluster,
    trio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = configuration(trio, tmp_path / "runs")
    job = submitted(cluster, tree, tmp_path, monkeypatch, capsys)
    story = [f"first step behind {job.wait('first steps', lambda: job.step > 0):.1f} s"]

    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--wrap=:")
    took = job.wait("end of the ranks", lambda: not job.ranks())
    job.wait("requeue behind a preemption", lambda: job.is_requeued(1))
    preempted = job.step
    assert 0 < preempted < LAST
    story += [f"preempted behind step {preempted}: all ranks gone {took:.1f} s behind the other job's submission"]
    took = job.wait("steps behind the preemption", lambda: job.step > preempted)
    assert cluster.facts(urgent)["JobState"] == "COMPLETED"
    story += [f"first step of the second start {took:.1f} s behind that"]

    killed, began = job.step, time.monotonic()
    job.ranks()["3"].kill()
    job.wait("restart within the job", lambda: "restart 1: going on from the newest checkpoint" in job.said())
    job.wait("steps behind the restart", lambda: job.said().count("resumed from ") == 2 and job.step > killed)
    story += [f"rank 3 killed in step {killed + 1}: {time.monotonic() - began:.1f} s until a step behind that"]
    assert cluster.facts(job.number)["Restarts"] == "1"

    for rank in job.ranks().values():  # so that the run is not over before Slurm looks at its time, and wakes them
        rank.suspend()
    cluster.update(JobId=job.number, TimeLimit=running_minutes(job) + 30)
    job.wait("requeue at the time limit", lambda: job.is_requeued(2))
    cluster.update(JobId=job.number, TimeLimit="2:00:00")
    stopped = job.step
    assert stopped < LAST, "the run was over before its time"

    cluster.update(NodeName=NODES[1], State="DRAIN", Reason="taken from the test")
    cluster.update(JobId=job.number, NumNodes="1-2", NumCPUs=2)
    job.wait("end", lambda: cluster.facts(job.number)["JobState"] == "COMPLETED")

    undisturbed = train(tree | {"name": "undisturbed"}, 4)
    mine, theirs = read_steps(job.run_dir), read_steps(undisturbed)
    assert [step["step"] for step in mine] == [step["step"] for step in theirs] == list(range(1, LAST + 1))
    same = ("tokens", "processed_tokens", "loss")
    assert [[step[key] for key in same] for step in mine[:stopped]] == [
        [step[key] for key in same] for step in theirs[:stopped]
    ]
    for one, other in zip(mine[stopped:], theirs[stopped:], strict=True):  # in another layout
        assert [one[key] for key in same[:2]] == [other[key] for key in same[:2]]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    said = job.said()
    assert said.count("stopped by a signal: back into the queue") == 2  # the log of all starts
    assert said.count("all on tp=2 pp=1, dp=2 on cpu") == 3 and said.count("all on tp=2 pp=1 on cpu") == 1
    with capsys.disabled():
        print("\n" + "\n".join(story))


def test_what_slurm_has_against_a_job_is_one_line(
    cluster: Cluster,
    trio: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(configuration(trio, tmp_path / "runs")))
    arguments = ["slurm", "--config", tmp_path / "c.yaml", "--submit", "--nodes", 2]
    assert ultrafuser(monkeypatch, *arguments, "--partition", "nowhere") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch: ") and "invalid partition" in error.lower() and error.count("\n") == 1
