"""What a bare machine lacks is named, and only that is installed from the wheels that travelled along."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from support.scripts import TOOLS

NEEDED = str(TOOLS / "benchmarks" / "needed.py")


def needed(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, NEEDED, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def wheel(folder: Path, name: str) -> None:
    """A wheel of one module that says its name."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{name}.py", f"NAME = {name!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_missing_modules_are_named_and_others_not() -> None:
    assert needed("--missing", "json,no_such_module,no_such.inner,torch").stdout == "no_such_module, no_such.inner\n"


def test_only_wheels_of_missing_packages_are_installed(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "ufm_carried_along")
    wheel(tmp_path / "wheels", "torch")  # which is there, and must stay what it is
    done = needed("--wheels", tmp_path / "wheels", "--target", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "missing here, installed from wheels: ufm_carried_along\n"
    assert {path.name for path in (tmp_path / "site").glob("*.py")} == {"ufm_carried_along.py"}


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = needed("--wheels", tmp_path / "none", "--target", tmp_path / "site")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "is not a folder; tools/gpu_wheels.sh makes one" in done.stderr
