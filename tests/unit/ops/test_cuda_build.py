"""What UFM_BUILD_CUDA makes of machines with and without a working nvcc, which scripts play: no CUDA is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="setup.py needs pybind11, which isolated builds bring along")
pytest.importorskip("setuptools", reason="setup.py needs setuptools, which isolated builds bring along")

REPOSITORY = Path(__file__).parents[3]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
WORKING = """#!/bin/sh
case "$*" in
--list-gpu-code) echo sm_75 sm_80 sm_90 ;;
*) while [ "$1" != "-o" ]; do echo "$1" >> "$(dirname "$0")/arguments"; shift; done; echo built > "$2" ;;
esac
"""
BROKEN = """#!/bin/sh
[ "$*" = --list-gpu-code ] && echo sm_80 && exit 0
echo "note: something" >&2
echo "gate_kernels.cu(7): error: unsupported GNU version" >&2
exit 2
"""
OLD = """#!/bin/sh
echo sm_60 sm_70
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.py needs, with the C++ extension already built: a stand-in, newer than its sources."""
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    ops = tmp_path / "built" / "ultrafuser_mega" / "ops"
    ops.mkdir(parents=True)
    built = ops / f"_cpu_epilogue{SUFFIX}"
    built.write_text("stand-in")
    newest = max(source.stat().st_mtime for source in (tmp_path / "csrc").iterdir())
    os.utime(built, (newest + 10, newest + 10))
    return tmp_path


def build(checkout: Path, wanted: str | None, nvcc: str | None) -> subprocess.CompletedProcess:
    home = checkout / "cuda"
    (home / "bin").mkdir(parents=True, exist_ok=True)
    if nvcc:
        (home / "bin" / "nvcc").write_text(nvcc)
        (home / "bin" / "nvcc").chmod(0o755)
    environment = os.environ | {"CUDA_HOME": str(home)}
    environment.pop("UFM_BUILD_CUDA", None)
    if wanted is not None:
        environment["UFM_BUILD_CUDA"] = wanted
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=100)


def extension(checkout: Path) -> Path:
    return checkout / "built" / "ultrafuser_mega" / "ops" / f"_cuda_gate{SUFFIX}"


@pytest.mark.parametrize("wanted", [None, "1"])
def test_a_working_nvcc_builds_for_the_generations_it_knows(checkout, wanted):
    done = build(checkout, wanted, WORKING)
    assert done.returncode == 0, done.stderr
    assert extension(checkout).read_text() == "built\n"
    arguments = (checkout / "cuda" / "bin" / "arguments").read_text().split()
    assert [a for a in arguments if a.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert "-cudart=static" in arguments


REASONS = {
    "none": (None, "no nvcc in {home}/bin (CUDA_HOME)"),
    "broken": (BROKEN, "{home}/bin/nvcc failed with code 2: gate_kernels.cu(7): error: unsupported GNU version"),
    "old": (OLD, "{home}/bin/nvcc knows none of sm_80, sm_90, sm_100"),
}


@pytest.mark.parametrize("case", REASONS)
def test_auto_goes_on_without_cuda_and_says_why_in_one_line(checkout, case):
    nvcc, reason = REASONS[case]
    done = build(checkout, "auto", nvcc)
    assert done.returncode == 0, done.stderr
    assert not extension(checkout).exists()
    expected = f"ultrafuser_mega: built without CUDA kernels: {reason.format(home=checkout / 'cuda')}"
    assert expected in done.stdout.splitlines()


@pytest.mark.parametrize("case", REASONS)
def test_1_fails_with_the_reason_in_one_line(checkout, case):
    nvcc, reason = REASONS[case]
    done = build(checkout, "1", nvcc)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == f"UFM_BUILD_CUDA=1: {reason.format(home=checkout / 'cuda')}"


def test_0_leaves_it_out_without_looking(checkout):
    done = build(checkout, "0", WORKING)
    assert done.returncode == 0, done.stderr
    assert not extension(checkout).exists() and "CUDA" not in done.stdout


def test_anything_else_is_refused(checkout):
    done = build(checkout, "yes", WORKING)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "UFM_BUILD_CUDA: 'yes' is none of 0, 1, auto"


def test_the_cuda_runtime_inside_stays_invisible_to_pytorchs_own():
    """PyTorch loads a CUDA runtime into the global scope; a symbol of ours bound to it would mix two versions."""
    from ultrafuser_mega import ops

    found = list(Path(ops.__file__).parent.glob("_cuda_gate*.so"))
    if not found or shutil.which("nm") is None:
        pytest.skip("needs the CUDA extension built in this tree, and nm")
    symbols = subprocess.run(["nm", "-D", str(found[0])], capture_output=True, text=True, check=True).stdout
    assert [line for line in symbols.splitlines() if "cuda" in line.lower()] == [
        line for line in symbols.splitlines() if "PyInit__cuda_gate" in line
    ]


def test_a_built_extension_imports_without_a_gpu():
    pytest.importorskip("ultrafuser_mega.ops._cuda_gate", reason="the CUDA extension is not built in this tree")
    from ultrafuser_mega.ops import _cuda_gate

    assert _cuda_gate.MAX_SPECIALISTS >= 3
    assert isinstance(_cuda_gate.why_unusable(0), str)
