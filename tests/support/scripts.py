"""The scripts of tools/benchmarks/ as modules, and as people call them, in this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def script(name: str) -> ModuleType:
    """tools/benchmarks/<name>.py."""
    return importlib.import_module(name)


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> int:
    """Exit code of ``python tools/benchmarks/<name>.py arguments...``."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    try:
        script(name).main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
