"""Code in a process that cannot import this package: what a user of a release folder has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ultrafuser_mega", "megatron"):
            raise ImportError(name + " must not be needed")

sys.meta_path.insert(0, Blocked())
"""


def run_without_this_package(code: str, arguments: list[object], folder: Path) -> Any:
    """What ``code`` prints last, from JSON. It runs in ``folder``, where transformers also keeps remote code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _BLOCK + code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
