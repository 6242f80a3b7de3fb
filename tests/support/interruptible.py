"""Processes that a test interrupts, wherever the tests themselves run: what is ignored is inherited."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def start_interruptible(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """``subprocess.Popen`` of a program that SIGINT reaches, also where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what has a handler here has the default there
    try:
        return subprocess.Popen(command, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)
