"""A profiler's trace: a compressed file for chrome://tracing or Perfetto, and a table of what took longest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 25


class Trace:
    """Between ``begin`` and ``end`` everything is recorded; ``end`` writes the trace and returns the table."""

    def __init__(self, device: torch.device, path: Path | None) -> None:
        """``path``: .json.gz, or None for the table alone."""
        self.on_gpu, self.path = device.type == "cuda", path
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_gpu
        self._profile = profile(activities=activities)

    def begin(self) -> None:
        self._profile.start()

    def end(self) -> list[dict[str, Any]]:
        """One record per operator or kernel, by its own time on the device, the longest first."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        if self.path is not None:
            unfinished = self.path.with_name(f"unfinished-{self.path.name}")  # the suffix says that it is compressed
            self._profile.export_chrome_trace(str(unfinished))
            unfinished.replace(self.path)
        own = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events = sorted(self._profile.key_averages(), key=lambda event: -getattr(event, own))
        return [
            {"name": event.key[:120], "calls": event.count, "own_ms": getattr(event, own) / 1e3}
            for event in events[:TOP]
        ]


def traced(call: Callable[[], object], device: torch.device, path: Path | None) -> list[dict[str, Any]]:
    """The table of one call."""
    trace = Trace(device, path)
    trace.begin()
    call()
    return trace.end()
