"""Which part of its step a rank is in, and how long the parts took.

One object per rank, passed to what takes part in a step. A phase inside another takes its seconds from it, so that all
phases of a step add up to no more than the step. Who watches for hangs reads ``current`` from another thread; a
profiler sees every phase as a range of its name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

IDLE = "between phases"


class Phases:
    """See the module.

    current  the innermost phase that runs, IDLE outside of all
    since    when it was entered, or come back to, by ``time.monotonic``
    """

    def __init__(self) -> None:
        self.current = IDLE
        self.since = time.monotonic()
        self._seconds: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Everything inside is of phase ``name``, but for phases inside it."""
        outer = self.current
        self._enter(name)
        try:
            with record_function(name):
                yield
        finally:
            self._enter(outer)

    def take(self) -> dict[str, float]:
        """Phase -> seconds of this rank's host since the last call."""
        self._enter(self.current)
        taken, self._seconds = dict(self._seconds), Counter()
        taken.pop(IDLE, None)
        return taken

    def _enter(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[self.current] += now - self.since
        self.current, self.since = name, now
