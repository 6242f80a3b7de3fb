"""A signal asks a job to end: all ranks stop behind one step with a checkpoint, and the code says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from filelock import FileLock
from support.interruptible import start_interruptible
from support.trio import COLOCATED_TP2, config_tree, read_steps

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import EXIT_GO_ON

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def tree(trio: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that does not end by itself."""
    tree = config_tree(trio, tmp_path / "runs", COLOCATED_TP2)
    tree["stage1"] |= {"steps": 5000}
    return tree


def start(tree: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """``ultrafuser train``, in its stage 1."""
    (folder / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    program = "from ultrafuser_mega.cli import main; main()"
    job = start_interruptible(
        [sys.executable, "-c", program, "train", "--config", str(folder / "c.yaml"), "--ranks", "2"],
        cwd=PROJECT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    metrics = FuserConfig.model_validate(tree).run_dir / "metrics.jsonl"
    while job.poll() is None and not (metrics.is_file() and '"kind": "step"' in metrics.read_text()):
        time.sleep(0.1)
    return job


def test_one_rank_that_is_asked_to_stop_stops_all_behind_one_step_with_a_checkpoint(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    with start(tree, tmp_path) as job:
        (second,) = (rank for rank in psutil.Process(job.pid).children() if rank.environ().get("RANK") == "1")
        second.send_signal(signal.SIGUSR1)
        said, _ = job.communicate(timeout=60)
    run_dir = FuserConfig.model_validate(tree).run_dir
    assert job.returncode == EXIT_GO_ON == 75, said
    ((progress, path),) = list_checkpoints(run_dir / "checkpoints")
    assert len(read_steps(run_dir)) == progress.step
    last = f"stopped by SIGUSR1 behind stage 1 step {progress.step} of 5000; --resume goes on from there"
    assert said.splitlines()[-1].strip() == last, said
    assert path.is_dir()


def test_ctrl_c_says_where_it_stopped_and_a_second_one_ends_at_once(tree: dict[str, Any], tmp_path: Path) -> None:
    with start(tree, tmp_path) as job:
        ranks = psutil.Process(job.pid).children()
        for rank in ranks:
            rank.suspend()  # no step ends
        job.send_signal(signal.SIGINT)
        time.sleep(0.5)
        job.send_signal(signal.SIGINT)
        said, _ = job.communicate(timeout=60)
    run_dir = FuserConfig.model_validate(tree).run_dir
    assert job.returncode == 130
    assert said.splitlines()[-1] == "interrupted at once; the run has no checkpoint yet"
    assert not any(rank.is_running() for rank in ranks)
    with FileLock(run_dir / ".lock", timeout=10):
        pass
