"""The processes of vLLM's engines, before they know of vLLM."""

from __future__ import annotations

import signal
import subprocess
import sys

_STARTS_ONE_AND_IS_KILLED = """
import os, signal
from ultrafuser_mega.inference.vllm.processes import _Process
process = _Process("math")
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_process_ends_where_the_process_that_started_it_was_killed() -> None:
    """It holds the other end of standard output, so ``run`` comes back when it has ended."""
    done = subprocess.run(
        [sys.executable, "-c", _STARTS_ONE_AND_IS_KILLED], stdout=subprocess.PIPE, timeout=240, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout)
