"""What UFM_BUILD_CUDA makes of machines with and without a working nvcc, which scripts play: no CUDA is needed."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
while [ "$1" != "-o" ]; do shift; done; head -c 1000 /dev/zero > "$2"
echo "note: something" >&2
echo "gate_kernels.cu(7): error: unsupported GNU version" >&2
exit 2
"""
SILENT = """#!/bin/sh
[ "$*" = --list-gpu-code ] && echo sm_80
exit 0
"""
OLD = """#!/bin/sh
echo sm_60 sm_70
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.py needs, with the C++ extensions already built: stand-ins, newer than their sources."""
    shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    newest = max(source.stat().st_mtime for source in (tmp_path / "csrc").iterdir())
    for name in ("ops/_cpu_epilogue", "models/_cpu_elementwise"):
        built = tmp_path / "built" / "ultrafuser_mega" / f"{name}{SUFFIX}"
        built.parent.mkdir(parents=True)
        built.write_text("stand-in")
        os.utime(built, (newest + 10, newest + 10))
    return tmp_path


def build(checkout: Path, wanted: str | None, nvcc: str | None, *more: str) -> subprocess.CompletedProcess[str]:
    home = checkout / "cuda"
    (home / "bin").mkdir(parents=True, exist_ok=True)
    if nvcc:
        (home / "bin" / "nvcc").write_text(nvcc)
        (home / "bin" / "nvcc").chmod(0o755)
    environment = os.environ | {"CUDA_HOME": str(home)}
    environment.pop("UFM_BUILD_CUDA", None)
    if wanted is not None:
        environment["UFM_BUILD_CUDA"] = wanted
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built", *more]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=100)


def extension(checkout: Path, folder: str = "built") -> Path:
    return checkout / folder / "ultrafuser_mega" / "ops" / f"_cuda_gate{SUFFIX}"


def libraries(checkout: Path) -> list[str]:
    """Every file that the builds left for the CUDA extension, whole or not."""
    return [str(path.relative_to(checkout)) for path in checkout.rglob("*_cuda_gate*")]


@pytest.mark.parametrize("wanted", [None, "1"])
def test_a_working_nvcc_builds_for_the_generations_it_knows(checkout: Any, wanted: str | None) -> None:
    done = build(checkout, wanted, WORKING)
    assert done.returncode == 0, done.stderr
    assert extension(checkout).read_text() == "built\n"
    assert libraries(checkout) == [str(extension(checkout).relative_to(checkout))]
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
def test_auto_goes_on_without_cuda_and_says_why_in_one_line(checkout: Any, case: Any) -> None:
    nvcc, reason = REASONS[case]
    done = build(checkout, "auto", nvcc)
    assert done.returncode == 0, done.stderr
    assert libraries(checkout) == []
    expected = f"ultrafuser_mega: built without CUDA kernels: {reason.format(home=checkout / 'cuda')}"
    assert expected in done.stdout.splitlines()


@pytest.mark.parametrize("case", REASONS)
def test_1_fails_with_the_reason_in_one_line(checkout: Any, case: Any) -> None:
    nvcc, reason = REASONS[case]
    done = build(checkout, "1", nvcc)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == f"UFM_BUILD_CUDA=1: {reason.format(home=checkout / 'cuda')}"
    assert libraries(checkout) == []


def test_1_fails_where_nvcc_claims_success_without_a_library(checkout: Any) -> None:
    done = build(checkout, "1", SILENT)
    assert done.returncode != 0
    assert f"UFM_BUILD_CUDA=1: {checkout}/cuda/bin/nvcc succeeded but left no library" in done.stderr


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_a_failed_build_does_not_pass_for_one_that_is_up_to_date(checkout: Any, wanted: str) -> None:
    build(checkout, wanted, BROKEN)
    done = build(checkout, "1", WORKING)
    assert done.returncode == 0, done.stderr
    assert extension(checkout).read_text() == "built\n"


def test_0_leaves_it_out_without_looking(checkout: Any) -> None:
    done = build(checkout, "0", WORKING)
    assert done.returncode == 0, done.stderr
    assert not extension(checkout).exists() and "CUDA" not in done.stdout


@pytest.mark.parametrize(("wanted", "nvcc"), [("0", WORKING), ("auto", None), ("auto", BROKEN)])
def test_what_is_not_built_is_not_left_over_from_an_earlier_build_either(checkout: Any, wanted: Any, nvcc: Any) -> None:
    """In place, where Python would import it, and in the build's folder, from which wheels are packed."""
    for room in ("ops", "models"):
        (checkout / "ultrafuser_mega" / room).mkdir(parents=True)
    assert build(checkout, "1", WORKING, "--inplace").returncode == 0
    assert extension(checkout).exists() and extension(checkout, ".").exists()
    (checkout / "cuda" / "bin" / "nvcc").unlink()
    os.utime(checkout / "csrc" / "gate_kernels.cu")  # as after an edit: it has to be compiled again
    done = build(checkout, wanted, nvcc, "--inplace")
    assert done.returncode == 0, done.stderr
    assert libraries(checkout) == []


def test_anything_else_is_refused(checkout: Any) -> None:
    done = build(checkout, "yes", WORKING)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "UFM_BUILD_CUDA: 'yes' is none of 0, 1, auto"


def test_the_cuda_runtime_inside_stays_invisible_to_pytorchs_own() -> None:
    """PyTorch loads a CUDA runtime into the global scope; a symbol of ours bound to it would mix two versions."""
    from ultrafuser_mega import ops

    found = list(Path(ops.__file__).parent.glob("_cuda_gate*.so"))
    if not found or shutil.which("nm") is None:
        pytest.skip("needs the CUDA extension built in this tree, and nm")
    symbols = subprocess.run(["nm", "-D", str(found[0])], capture_output=True, text=True, check=True).stdout
    assert [line for line in symbols.splitlines() if "cuda" in line.lower()] == [
        line for line in symbols.splitlines() if "PyInit__cuda_gate" in line
    ]


@pytest.fixture
def extension_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets gate_scale_cuda find its extension in a folder of this test alone."""
    from ultrafuser_mega.ops import gate_scale_cuda

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gate_scale_cuda, "MODULE", "_cuda_gate")
    monkeypatch.delitem(sys.modules, "_cuda_gate", raising=False)
    gate_scale_cuda._kernels.cache_clear()
    yield tmp_path
    sys.modules.pop("_cuda_gate", None)
    gate_scale_cuda._kernels.cache_clear()


def served(device: int = 0) -> bool:
    from ultrafuser_mega.ops import gate_scale_cuda

    return gate_scale_cuda.serves(torch.device("cuda", device), torch.float32, 3)


def test_plain_pytorch_takes_over_silently_where_the_extension_was_not_built(extension_from: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not served()


def test_plain_pytorch_takes_over_with_one_warning_where_the_library_is_damaged(extension_from: Any) -> None:
    (extension_from / f"_cuda_gate{SUFFIX}").write_bytes(bytes(1000))
    with pytest.warns(UserWarning, match="cannot be loaded: .*_cuda_gate.*; PyTorch's take over") as caught:
        assert not served() and not served()
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_asking_whether_a_gpu_can_be_used_leaves_the_callers_device_as_it_was(
    extension_from: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels set the device in a CUDA runtime of their own; PyTorch's guard is what sets it back."""
    (extension_from / "_cuda_gate.py").write_text(
        "MAX_SPECIALISTS = 16\n"
        "guarded_by = []\n"
        "def why_unusable(device):\n"
        "    return '' if guarded_by == [device] else 'not guarded'\n"
    )

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[Any]:
        kernels = importlib.import_module("_cuda_gate")
        kernels.guarded_by.append(device)
        yield
        kernels.guarded_by.pop()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert served(3)


def test_a_built_extension_imports_without_a_gpu() -> None:
    pytest.importorskip("ultrafuser_mega.ops._cuda_gate", reason="the CUDA extension is not built in this tree")
    from ultrafuser_mega.ops import _cuda_gate

    assert _cuda_gate.MAX_SPECIALISTS >= 3
    assert isinstance(_cuda_gate.why_unusable(0), str)
