"""tools/gpu_check.sh where there is no GPU, in which order it works, and how it ends when steps fail, lack their
packages or find no time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.scripts import TOOLS

# Says that there is a GPU, does nothing for a step, and is Python for what collects and reports. One step fails and one
# package is missing.
PYTHON_WITH_A_GPU = f"""#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in
    *get_device_name*) echo a_gpu ;;
    *get_device_capability*) echo 90 ;;
    *check_values.py*) exit 3 ;;
    *--missing*megatron*) echo megatron.core ;;
    "- "*/*) exec {sys.executable} "$@" ;;
    *gpu_report.py*) exec {sys.executable} "$@" ;;
esac
"""
IN_ORDER = ["versions", "build", "build_cuda", "values", "toy", "llama2-13b", "llama3-8b", "llama2-13b_eighth"]
IN_ORDER += ["llama3-8b_eighth", "tests", "questions", "beside_plain", "loss_profile", "gate_kernels", "layer_kernels"]
IN_ORDER += ["tiles"]


def gpu_check(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(TOOLS / "gpu_check.sh"), str(out)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def pretended(tmp_path: Path) -> dict[str, str]:
    """Environment of a machine with a GPU on which no step does anything."""
    python = tmp_path / "python"
    python.write_text(PYTHON_WITH_A_GPU)
    python.chmod(0o755)
    return {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}


@pytest.mark.timeout(120)
def test_without_a_gpu_it_ends_at_once_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = gpu_check(out, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "gpu_check: no CUDA device; run this on a machine with a GPU\n"
    assert not out.exists()


@pytest.mark.timeout(240)
def test_the_report_is_made_even_when_every_step_was_left_out(tmp_path: Path, pretended: Any) -> None:
    done = gpu_check(tmp_path, **pretended, GPU_CHECK_SECONDS="0")
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "a_gpu.json").read_text())["steps"]
    assert list(steps)[: len(IN_ORDER)] == IN_ORDER
    text = (tmp_path / "a_gpu.md").read_text()
    assert "| llama2-13b | train, chunked: x bare GEMMs | <= 1.15 |  | not measured |  |" in text
    assert "| build |  | left out: no time |" in text
    assert done.stdout.splitlines()[-1].startswith("gpu_check: FAILED or left out: versions build ")
    assert "warm_kernels.py" not in Path(pretended["CALLS"]).read_text()


@pytest.mark.timeout(240)
def test_what_failed_or_lacks_a_package_does_not_stop_what_follows_and_does_not_pass(
    tmp_path: Path, pretended: Any
) -> None:
    done = gpu_check(tmp_path, **pretended)
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "a_gpu.json").read_text())["steps"]
    assert list(steps)[: len(IN_ORDER)] == IN_ORDER
    assert steps["values"]["exit_code"] == 3
    lacking = ("toy", "beside_plain", "checkpoint")
    assert all(steps[name] == {"missing": "megatron.core"} for name in lacking)
    others = set(steps) - {"values", *lacking}
    assert all(steps[name]["exit_code"] == 0 for name in others)
    text = (tmp_path / "a_gpu.md").read_text()
    assert "| toy |  | **MISSING**: megatron.core is not installed |" in text
    assert "FAILED with exit code 3" in text
    assert done.stdout.splitlines()[-1] == "gpu_check: FAILED or left out: values toy beside_plain checkpoint"
    calls = Path(pretended["CALLS"]).read_text().splitlines()
    warmed = next(i for i, call in enumerate(calls) if "warm_kernels.py --capability 90" in call)
    assert warmed < next(i for i, call in enumerate(calls) if "check_values.py" in call)
