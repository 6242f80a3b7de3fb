"""Why a run ends before its last step: a signal asks it to, or its time is up. All ranks stop behind the same step.

A signal reaches ranks at different moments, and some not at all. So every rank puts what it was asked to do into the
numbers that a step's statistics reduce in any case, and the largest counts for all; nobody waits for more than that.

The bound: what runs is finished, at most an evaluation and a step, and a checkpoint that is being written; another one
is written; that is all. ``Stopping.bound`` has it in seconds. Behind the last step the run is finished instead: an
evaluation and the report. A second signal ends a rank at once. Before the weights are there is nothing to save: then a
signal does what it does to any program.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ultrafuser_mega.errors import EXIT_GO_ON

#: What schedulers, launchers and people end a job with: Slurm's preemption and time limit, torchrun, Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Slurm signals every process of a job, launchers pass on what they get: one request comes more than once.
_ONE_REQUEST_S = 1.0
_TIME_IS_UP = 0.5  # less than every signal's number, which are integers


@dataclass(frozen=True)
class Stop:
    """why: in words; code: that the job exits with."""

    why: str
    code: int


class Stopping:
    """What this rank was asked to do, and what all of them do.

    Args:
        begun: when the run began, by ``time.monotonic``.
        minutes: that it may take; None: any number.
    """

    def __init__(self, begun: float, minutes: float | None) -> None:
        self._time_is_up = None if minutes is None else begun + 60 * minutes
        self._asked: tuple[int, float] | None = None  # the first signal, and when it came
        self._longest: dict[str, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests; those that this process ignores (nohup's) stay ignored."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        for number in heard:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number] or signal.SIG_DFL)

    @property
    def wanted(self) -> float:
        """What this rank was asked to do, as a number whose largest over the ranks goes to :meth:`agreed`."""
        if self._asked is not None:
            return float(self._asked[0])
        up = self._time_is_up is not None and time.monotonic() >= self._time_is_up
        return _TIME_IS_UP if up else 0.0

    @staticmethod
    def agreed(largest: float) -> Stop | None:
        """What all ranks do behind this step; None: go on."""
        if largest == 0.0:
            return None
        if largest == _TIME_IS_UP:
            return Stop("time is up (checkpoint.stop_after_minutes)", 0)
        number = signal.Signals(int(largest))
        if number == signal.SIGINT:  # by a person, who does not want it queued again
            return Stop("interrupted", 128 + number)
        return Stop(f"stopped by {number.name}", EXIT_GO_ON)

    def took(self, what: str, seconds: float) -> None:
        """A "step", an "evaluation" or a "checkpoint" was seen to take so long."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    @property
    def bound(self) -> str:
        """Within which time a signal ends the run, in words, by the longest of everything until now."""
        step, evaluation, save = (self._longest.get(what, 0.0) for what in ("step", "evaluation", "checkpoint"))
        parts = f"a step {step:.1f}, an evaluation {evaluation:.1f}, two checkpoints of {save:.1f}"
        return (
            f"a signal ends the run within about {step + evaluation + 2 * save:.1f} s, by the longest so far: {parts}"
        )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = (number, now)
        elif now - self._asked[1] > _ONE_REQUEST_S:
            os._exit(128 + number)
