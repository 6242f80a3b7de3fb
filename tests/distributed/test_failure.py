"""One rank fails: its error is shown once, the others stay silent, the job ends at once with the right exit codes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from support.launched import DEADLINE_S, RANKS, launch
from support.trio import COLOCATED_TP2, config_tree, read_steps
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.launch.rank import train_main
from ultrafuser_mega.runtime import failure
from ultrafuser_mega.runtime.device import joined_job, launched_rank, launcher_store
from ultrafuser_mega.runtime.failure import first_failure_ends_job

PROJECT = Path(__file__).parents[2]


def fail_while_others_wait(failing: int, error: Exception) -> int:
    """A job in which one rank raises and the others wait for it in a collective."""
    store = launcher_store()
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store):
        dist.barrier()
        if launched_rank() == failing:
            raise error
        dist.all_reduce(torch.ones(1))
    return 0


@pytest.mark.parametrize("failing", [0, 2])  # rank 0 hosts the store that the ranks share
def test_defect_of_one_rank_shows_one_traceback(tmp_path: Path, failing: int) -> None:
    codes, errors = launch(fail_while_others_wait, tmp_path, failing, RuntimeError("out of cheese"))
    assert codes == [1, 1, 1]
    assert errors.count("Traceback (most recent call last)") == 1
    assert errors.count("RuntimeError: out of cheese") == 1
    assert f"failed (rank {failing} of 3):" in errors


@pytest.mark.parametrize("failing", [0, 2])
def test_bad_input_of_one_rank_is_one_line_without_a_traceback(tmp_path: Path, failing: int) -> None:
    codes, errors = launch(fail_while_others_wait, tmp_path, failing, InputError("data.root: 'x' is not there"))
    assert codes[failing] == 2
    assert 0 not in codes
    assert errors.count("error: data.root: 'x' is not there\n") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.ENOTDIR], ids=["full", "pipe", "name"])
def test_what_the_system_has_against_a_place_is_one_line_without_a_traceback(tmp_path: Path, number: int) -> None:
    codes, errors = launch(fail_while_others_wait, tmp_path, 2, OSError(number, os.strerror(number), "runs/a/plots"))
    assert codes[2] == 2
    assert errors.count(f"error: runs/a/plots: cannot be read or written ({os.strerror(number)}") == 1
    assert errors.count("GB are free there") == (number == errno.ENOSPC)
    assert "Traceback" not in errors


def die_while_others_wait(dying: int) -> int:
    """A job in which one rank is killed, which no exception tells of, and the others lose it in a collective."""
    failure._PATIENCE_S = 1.0
    store = launcher_store()
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store):
        dist.barrier()
        if launched_rank() == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))
    return 0


def test_a_rank_killed_in_silence_is_told_of_once_by_a_survivor(tmp_path: Path) -> None:
    codes, errors = launch(die_while_others_wait, tmp_path, 2)
    assert codes == [1, 1, -signal.SIGKILL]
    assert errors.count("failed (rank ") == 1
    assert errors.splitlines()[-1].startswith("no other rank said why: one may have been killed, ")


def fail_after_the_others_noticed(failing: int) -> int:
    """The connection breaks before the rank that broke it says why."""
    store = launcher_store()
    with first_failure_ends_job(store):
        if launched_rank() == failing:
            time.sleep(2.0)
            raise InputError("data.root: 'x' is not there")
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4321")


def test_a_survivor_never_speaks_before_the_cause(tmp_path: Path) -> None:
    codes, errors = launch(fail_after_the_others_noticed, tmp_path, 1)
    assert codes == [1, 2, 1]
    assert errors == "error: data.root: 'x' is not there\n"


def leave_a_file_for_torchrun(folder: str) -> int:
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{launched_rank()}.json"
    return fail_after_the_others_noticed(1)


def test_every_ranks_part_of_torchruns_report_names_the_first_cause(tmp_path: Path) -> None:
    launch(leave_a_file_for_torchrun, tmp_path, str(tmp_path))
    found = [ProcessFailure(rank, 0, 1, str(tmp_path / f"{rank}.json")) for rank in range(RANKS)]
    report = ChildFailedError("job", dict(enumerate(found))).format_msg()
    assert report.count("traceback : error: data.root: 'x' is not there\n") == RANKS


def fail_together() -> int:
    with first_failure_ends_job(launcher_store()):
        raise InputError("everyone reads the same file")


def test_what_every_rank_finds_is_said_once(tmp_path: Path) -> None:
    codes, errors = launch(fail_together, tmp_path)
    assert codes == [2, 2, 2]
    assert errors == "error: everyone reads the same file\n"


def work_together() -> int:
    store = launcher_store()
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store):
        total = torch.ones(1)
        dist.all_reduce(total)
    return 0 if total == RANKS else 3


def test_good_job_ends_in_silence(tmp_path: Path) -> None:
    assert launch(work_together, tmp_path) == ([0, 0, 0], "")


def test_process_started_by_hand_is_a_job_of_one() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=work_alone)
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == 0


def work_alone() -> None:
    store = launcher_store()
    with first_failure_ends_job(store), joined_job(torch.device("cpu"), store):
        assert dist.get_world_size() == 1
        dist.barrier()


def test_training_processes_agree_on_one_line_about_a_bad_configuration(tmp_path: Path) -> None:
    codes, errors = launch(train_main, tmp_path, None, [f"runs={tmp_path}", "stage1.step=5"], False)
    assert codes == [2, 2, 2]
    assert errors == "error: the embedded default: unknown key stage1.step; did you mean stage1.steps?\n"


def test_full_disk_in_mid_training_under_torchrun(trio: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 KiB: all goes well but for checkpoints.

    Reading the job's output to its end also shows that no helper process outlives the ranks: it would hold the pipe.
    """
    tree = config_tree(trio, tmp_path / "runs", COLOCATED_TP2)
    tree["stage1"] |= {"steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    limit = 100 * 1024
    job = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("examples/pretrain_fuser.py", "--config", str(tmp_path / "config.yaml")),
        ],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert job.returncode != 0
    assert len(read_steps(tmp_path / "runs" / "run")) == 5  # to the end, whose checkpoint must be there
    assert list_checkpoints(tmp_path / "runs" / "run" / "checkpoints") == []
    ours, _, report = job.stderr.partition("ChildFailedError")
    said = [line for line in ours.splitlines() if ": cannot be read or written (" in line]
    assert len(said) == 2
    assert "stage1-step0000002: " in said[0] and said[0].endswith("; training goes on")
    assert said[1].startswith("error: ") and "stage2-step0000003: " in said[1]
    assert report.count("traceback : error: ") == 2  # a line for each rank, all of the first cause
    tracebacks = job.stderr.split("Traceback (most recent call last)")[1:]
    assert [text for text in tracebacks if "ultrafuser_mega" in text] == []  # torchrun adds one of its own
