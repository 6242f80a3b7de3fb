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


@pytest.mark.timeout(400)
def test_a_run_under_faults_equals_the_undisturbed_one_and_leaves_nothing_behind(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", COLOCATED_TP2)
    tree["stage2"] |= {"steps": 6}
    tree["checkpoint"] = {"every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "tools/chaos.py", "--config", str(tmp_path / "c.yaml"), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*command, "--ranks", "2", "--faults", "3", "--kinds", "KILL,TERM,NAN", "--seed", "1"],
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["survived"] == {"KILL": "1 of 1", "TERM": "1 of 1", "NAN": "1 of 1"}
    assert report["losses_equal"] and report["weights_equal"] and report["left_behind"] == []
