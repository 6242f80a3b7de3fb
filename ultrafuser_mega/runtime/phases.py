"""Which part of its step a rank is in, and how long the parts took.

One object per rank, passed to what takes part in a step. A phase inside another takes its seconds from it, so the
phases of a step and what is in none of them (OTHER) add up to the step. Who watches for hangs reads ``current`` from
another thread; a profiler sees every phase as a range of its name.

On a GPU the host only says what is to be done. So there a phase's bounds are events in the stream that the work is in,
and its seconds are the device's. They are read when the step after is done: nobody waits for them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

IDLE = "between phases"
OTHER = "other"
ANSWERING = "answering"  # of prompts that a student learns from

_Bound = float | torch.Event  # seconds of this host, or a place in the device's work


class Phases:
    """See the module.

    Args:
        device: whose seconds count; default: this host's.

    Attributes:
        current: the innermost phase that runs, as in "forward of text" or "forward of text in evaluation"; IDLE outside
            of all.
        since: when it was entered, come back to, or gave its last sign of life (:meth:`go_on`), by
            ``time.monotonic``.
        host_seconds: of the phases that were entered as a whole, all together: seconds that this host was in them.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.current = IDLE
        self.since = time.monotonic()
        self.host_seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device if device is not None and device.type == "cuda" else None
        self._whole: str | None = None
        self.restart()

    @contextmanager
    def __call__(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """Everything inside is of phase ``name``; but for phases inside it, unless they belong to the ``whole``."""
        outer, outer_whole = self.current, self._whole
        whole = whole and outer_whole is None
        begun = time.monotonic()
        self._enter(f"{name} in {outer_whole}" if outer_whole else name, name if whole else outer_whole)
        try:
            if torch.autograd._profiler_enabled():
                with record_function(self.current):
                    yield
            else:
                yield
        finally:
            self._enter(outer, outer_whole)
            if whole:
                self.host_seconds[name] += self.since - begun

    def go_on(self) -> None:
        """A sign of life in a phase that takes as long as there is work: ``since`` is now."""
        self.since = time.monotonic()

    def restart(self) -> None:
        """Forget the steps until now; a step begins."""
        self._ended: list[tuple[str, _Bound]] = []
        self._bounds: list[tuple[str, _Bound]] = [(self._counted, self._now())]

    def end_step(self) -> None:
        """A step ends, and the next one begins."""
        last = (self._counted, self._now())
        self._ended, self._bounds = [*self._bounds, last], [last]

    def of_last_step(self) -> dict[str, float]:
        """Phase -> seconds of the step that :meth:`end_step` ended last; {} before the first."""
        if not self._ended:
            return {}
        end = self._ended[-1][1]
        if isinstance(end, torch.Event) and not end.query():
            return {}
        seconds: defaultdict[str, float] = defaultdict(float)
        for (name, begin), (_, after) in zip(self._ended, self._ended[1:], strict=False):
            seconds[name] += _between(begin, after)
        return dict(seconds)

    @property
    def _counted(self) -> str:
        """The phase that what runs now counts to."""
        return self._whole or (OTHER if self.current == IDLE else self.current)

    def _enter(self, name: str, whole: str | None) -> None:
        before = self._counted
        self.current, self._whole, self.since = name, whole, time.monotonic()
        if self._counted != before:
            self._bounds.append((self._counted, self._now()))

    def _now(self) -> _Bound:
        if self._device is None:
            return time.monotonic()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


def _between(begin: _Bound, end: _Bound) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        return float(begin.elapsed_time(end)) / 1e3
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
