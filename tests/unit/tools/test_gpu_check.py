"""tools/gpu_check.sh where there is no GPU, and how it ends when nothing could be done in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import TOOLS

# Answers for the device, and is Python for everything else.
PYTHON_WITH_A_GPU = f"""#!/bin/sh
if [ "$1" = -c ]; then echo a_gpu; exit; fi
if [ "$*" = - ]; then cat >/dev/null; exit; fi
exec {sys.executable} "$@"
"""


def gpu_check(out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(TOOLS / "gpu_check.sh"), str(out)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)


@pytest.mark.timeout(120)
def test_without_a_gpu_it_ends_at_once_with_one_line(tmp_path):
    out = tmp_path / "results"
    done = gpu_check(out, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "gpu_check: no CUDA device; run this on a machine with a GPU\n"
    assert not out.exists()


@pytest.mark.timeout(120)
def test_the_report_is_made_even_when_every_step_failed_or_was_left_out(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON_WITH_A_GPU)
    python.chmod(0o755)
    done = gpu_check(tmp_path, PYTHON=str(python), GPU_CHECK_SECONDS="0")
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "a_gpu.json").read_text())["steps"]
    assert set(steps) >= {"build", "tests", "llama2-13b", "llama3-8b", "gate_kernels", "tiles"}
    text = (tmp_path / "a_gpu.md").read_text()
    assert "| llama2-13b | train, chunked: x bare GEMMs | <= 1.15 |  | not measured |  |" in text
    assert "| build |  | left out: no time |" in text
    assert done.stdout.splitlines()[-1].startswith("gpu_check: FAILED or left out: build llama2-13b ")
