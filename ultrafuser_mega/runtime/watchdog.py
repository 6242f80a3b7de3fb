"""Ends a job in which a rank hangs, and says which one, where, and in which line of the program.

A rank that hangs says nothing, and its peers wait for it in a collective. So a thread of every rank puts into the
launcher's store, every moment, which step and phase the rank is in and for how long. Where that is longer than any
phase takes, the ranks add their stacks, and one of them says what they have all left there. The rank that hangs is the
one that its peers wait for: one that does not answer any more (stopped, or its machine is gone), else one that is a
step behind, else one that does not wait in a collective, else the one that is longest in its phase.

Should no Python thread of a rank run any more (a library holds the interpreter's lock) or the store not answer, the
interpreter itself writes that rank's stacks and ends it.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from ultrafuser_mega.runtime.failure import end_job
from ultrafuser_mega.runtime.phases import Phases

_STACK_FRAMES = 6
_COLLECTIVES = "torch/distributed/"  # where the stack of a rank that waits for others ends


@dataclass(frozen=True)
class Sign:
    """What a rank has last said of itself.

    beat: number of its signs so far; place: for people; seconds: in the phase, when it said so; waits: for other ranks;
    stack: of the main thread, innermost last; "" while nothing is wrong; answers: still gives signs.
    """

    rank: int
    beat: int
    step: int
    place: str
    phase: str
    seconds: float
    waits: bool = False
    stack: str = ""
    answers: bool = True


class Watchdog:
    """Of one rank.

    Args:
        store: which all ranks share (:func:`ultrafuser_mega.runtime.device.launcher_store`).
        rank: this one.
        ranks: of the job.
        phases: of this rank.
        where: its step, counted through all stages, and that for people.
        seconds: that no phase takes.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        ranks: int,
        phases: Phases,
        where: Callable[[], tuple[int, str]],
        seconds: float,
    ) -> None:
        # A connection of its own: the other one may be waited at. (torch's stubs lack clone().)
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._rank, self._ranks, self._phases, self._where, self._seconds = rank, ranks, phases, where, seconds
        self._tick = min(max(seconds / 20, 0.1), 2.0)
        self._beat = 0
        self._known: dict[int, int] = {}  # rank -> its beat when signs were last read

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile the phases of this thread are watched."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(threading.get_ident(), over), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(10 * self._tick)
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, watched: int, over: threading.Event) -> None:
        try:
            while not over.wait(self._tick):
                faulthandler.dump_traceback_later(1.5 * self._seconds + 30, exit=True)
                if self._tell() > self._seconds and not self._others_go_on():
                    self._end(watched)
        except dist.DistError:  # the store's host is gone, and with it the job
            return

    def _tell(self, stack: str = "", waits: bool = False) -> float:
        """Give a sign; returns the seconds of this rank in its phase."""
        since, phase, (step, place) = self._phases.since, self._phases.current, self._where()
        seconds, self._beat = time.monotonic() - since, self._beat + 1
        sign = Sign(self._rank, self._beat, step, place, phase, seconds, waits, stack)
        self._store.set(f"watch/{self._rank}", json.dumps(asdict(sign)))
        return seconds

    def _end(self, watched: int) -> None:
        """End the job, unless the rank goes on while the others have a moment to say where they are."""
        beats = {sign.rank: sign.beat for sign in self._signs()}
        frames = traceback.extract_stack(sys._current_frames()[watched])
        waits = any(_COLLECTIVES in frame.filename for frame in frames[-4:])
        stack = "".join(traceback.format_list(frames[-_STACK_FRAMES:]))
        until = time.monotonic() + 2.0 + 5 * self._tick
        while time.monotonic() < until:
            if self._tell(stack, waits) < self._seconds or self._others_go_on():
                return
            time.sleep(self._tick)
        signs = [replace(sign, answers=sign.beat > beats.get(sign.rank, 0)) for sign in self._signs()]
        end_job(self._store, lambda: describe(signs), 1)

    def _others_go_on(self) -> bool:
        """Whether this rank waits for another that goes on in the same phase, with more prompts to answer."""
        signs = self._signs()
        (own,) = (sign for sign in signs if sign.rank == self._rank)
        fresh = [sign for sign in signs if sign.beat > self._known.get(sign.rank, 0)]
        self._known = {sign.rank: sign.beat for sign in signs}
        return goes_on(own, fresh, self._seconds)

    def _signs(self) -> list[Sign]:
        keys = [key for rank in range(self._ranks) if self._store.check([key := f"watch/{rank}"])]
        return [Sign(**json.loads(self._store.get(key))) for key in keys]


def goes_on(own: Sign, others: Sequence[Sign], seconds: float) -> bool:
    """Whether one of ``others`` has been in the phase and step of ``own`` for no longer than ``seconds``."""
    return any((s.step, s.phase) == (own.step, own.phase) and s.seconds <= seconds for s in others)


def describe(signs: Sequence[Sign]) -> str:
    """Which rank hangs, for people: its stack, and a last line that names it."""
    first, *others = sorted(signs, key=lambda sign: (sign.answers, sign.step, sign.waits, -sign.seconds, sign.rank))
    what = f"hangs for {first.seconds:.0f} s" if first.answers else "does not answer"
    line = f"failed: rank {first.rank} of {len(signs)} {what} in {first.phase}, {first.place}"
    if others:
        line += "; " + "; ".join(f"{_ranks(ranks)} in {phase}" for phase, ranks in _by_phase(others).items())
    return f"{first.stack}{line}"


def _by_phase(signs: Sequence[Sign]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for sign in signs:
        ranks.setdefault(sign.phase, []).append(sign.rank)
    return ranks


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(ranks)[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
