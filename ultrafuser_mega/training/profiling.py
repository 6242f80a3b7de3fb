"""A torch.profiler trace of some steps of chosen ranks, with the phases of the step as named ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.errors import writing

FOLDER = "profile"  # in the run's folder


class StepProfiler:
    """Wraps every step of a run; profiles those that were asked for.

    Args:
        config: of the run.
        rank: this one.
        device: where it computes.
    """

    def __init__(self, config: FuserConfig, rank: int, device: torch.device) -> None:
        self._span, self._ranks = config.profile.span, config.profile.ranks
        self._rank, self._device, self._folder = rank, device, config.run_dir / FOLDER
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step ``number``, counted from 1 through both stages."""
        if number in self._span and self._rank in self._ranks and self._profile is None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._profile = profile(activities=kinds, record_shapes=True)
            self._profile.start()
        try:
            yield
        finally:
            if self._profile is not None and number == self._span[-1]:
                self._write(self._profile)
                self._profile = None

    def written(self, number: int) -> str | None:
        """A line for people behind the last step that is profiled: where the traces are."""
        if not self._span or number != self._span[-1]:
            return None
        ranks = ", ".join(map(str, sorted(set(self._ranks))))
        return f"profile of steps {self._span[0]} to {number}, rank(s) {ranks}: {self._folder}"

    def _write(self, ended: profile) -> None:
        ended.stop()
        path = self._folder / f"steps{self._span[0]}-{self._span[-1]}-rank{self._rank}.json.gz"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            ended.export_chrome_trace(str(path))
