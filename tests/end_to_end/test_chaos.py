"""A run under faults ends by itself, equal to the undisturbed one bit for bit: the short version of tools/chaos.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.trio import COLOCATED_TP2, config_tree

PROJECT = Path(__file__).parents[2]
FAULTS = [  # kind, rank, step, phase
    ("SIGKILL", 1, 3, "writing a checkpoint"),
    ("FULL", 1, 4, ""),
    ("NAN", 1, 5, ""),
    ("PREEMPT", 0, 6, "loss"),
]


@pytest.mark.timeout(400)
def test_a_run_under_faults_equals_the_undisturbed_one_and_leaves_nothing_behind(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", COLOCATED_TP2)
    tree["stage2"] |= {"steps": 9}
    tree["checkpoint"] = {"every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "work" / "chaos").mkdir(parents=True)
    faults = [dict(zip(("kind", "rank", "step", "phase"), fault, strict=True)) for fault in FAULTS]
    (tmp_path / "work" / "chaos" / "faults.json").write_text(json.dumps(faults))
    done = subprocess.run(
        [
            *(sys.executable, "tools/chaos.py", "--config", str(tmp_path / "c.yaml")),
            *("--work", str(tmp_path / "work"), "--ranks", "2", "--faults", str(len(FAULTS)), "--forked"),
        ],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    log = tmp_path / "work" / "chaos" / "log"
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + (log.read_text()[-3000:] if log.is_file() else "")
    report = json.loads(done.stdout)
    assert report["survived"] == {kind: "1 of 1" for kind, *_ in FAULTS}
    assert report["injected_in_phase"]["writing a checkpoint"] == 1
    assert report["losses_equal"] and report["weights_and_optimizer_equal"]
    assert report["left_behind"] == report["processes_left"] == []
    said = " ".join(log.read_text().split())  # the console wraps
    for part in (
        "failed: rank 1 of 2 was killed by SIGKILL",
        "; training goes on",
        "stopped by SIGUSR1 behind stage 2",
    ):
        assert said.count(part) == 1, said
