"""How many requests may be under way at one model: as many as it takes, found out while it is asked.

Additive increase, multiplicative decrease (Chiu and Jain, 1989): one more for every full round of answers, half as many
when the model turns requests away. Requests that had left before the number was halved tell of the same wave and do not
halve it again. A host that queues what it cannot serve (as vLLM does) turns nothing away: there replies that take twice
as long for each token, while no more tokens come in all, count as too many.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from statistics import median

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_LONGEST_ASKED_S = 86400.0  # that an endpoint is believed to ask for
_SLOWER, _NO_MORE = 2.0, 1.05  # times the best time per token; times the tokens a second of then
_SMALLEST_WINDOW = 8  # replies


class Gate:
    """Where requests to one model wait until they may leave.

    Args:
        most: requests under way.
        per_minute: most that leave; None: any number.
        clock: seconds, ever rising.
        seed: of the jitter.

    Attributes:
        limit: requests that may be under way now; a fraction counts towards the next one.
        running: that are.
        waves: times that the limit was lowered.
    """

    def __init__(
        self, most: int, per_minute: int | None = None, clock: Callable[[], float] = time.monotonic, seed: int = 0
    ) -> None:
        self.most = most
        self.limit = float(most)
        self.running = 0
        self.waves = 0
        self._per_minute = per_minute
        self._clock = clock
        self._random = random.Random(seed)
        self._pause_until = self._next_slot = self._lowered_at = float("-inf")
        self._in_a_row = 0  # waves without an answer between them
        self._changed = asyncio.Condition()
        self._hurried = asyncio.Event()
        self._window: list[tuple[float, int]] = []  # seconds per token, tokens
        self._window_began: float | None = None
        self._best: tuple[float, float] | None = None  # seconds per token, tokens a second

    async def enter(self) -> float:
        """Wait for one's turn.

        Returns:
            When the request leaves, for :meth:`turned_away`.
        """
        async with self._changed:
            while True:
                wait = max(self._pause_until, self._next_slot) - self._clock()
                if self.running >= max(1, int(self.limit)):
                    await self._changed.wait()
                elif wait > 0 and not self._hurried.is_set():
                    self._changed.release()
                    try:
                        await asyncio.wait_for(self._hurried.wait(), wait)
                    except TimeoutError:
                        pass
                    finally:
                        await self._changed.acquire()
                else:
                    break
            self.running += 1
            now = self._clock()
            if self._per_minute is not None:
                self._next_slot = now + 60 / self._per_minute
            return now

    def hurry(self) -> None:
        """Nobody waits for the end of a pause any more: the run is over."""
        self._hurried.set()

    async def leave(self) -> None:
        """The request is over, however it went."""
        async with self._changed:
            self.running -= 1
            self._changed.notify_all()

    def turned_away(self, left_at: float, retry_after_s: float | None) -> None:
        """A request that left then met too many: 429, 503, 529."""
        if left_at > self._lowered_at:
            self._lower(0.5)
            self._in_a_row += 1
        if retry_after_s is None:
            longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._in_a_row - 1, 10))
            retry_after_s = longest * self._random.random()
        self._pause_until = max(self._pause_until, self._clock() + retry_after_s)

    def answered(self, seconds: float, tokens: int) -> None:
        """A reply of so many tokens came after so long."""
        self._in_a_row = 0
        self.limit = min(self.most, self.limit + 1 / max(1, int(self.limit)))
        now = self._clock()
        if self._window_began is None:
            self._window_began = now - seconds
        self._window.append((seconds / max(tokens, 1), tokens))
        if len(self._window) >= max(_SMALLEST_WINDOW, self.limit):
            self._judge(now)

    def _judge(self, now: float) -> None:
        assert self._window_began is not None
        each = median(one for one, _ in self._window)
        rate = sum(tokens for _, tokens in self._window) / max(now - self._window_began, 1e-9)
        self._window, self._window_began = [], now
        best_each, best_rate = self._best or (each, rate)
        if each <= _SLOWER * best_each:
            self._best = min(each, best_each), max(rate, best_rate)
        elif rate < _NO_MORE * best_rate:
            self._lower(0.75)

    def _lower(self, factor: float) -> None:
        self.limit = max(1.0, self.limit * factor)
        self._lowered_at = self._clock()
        self._window, self._window_began, self._best = [], None, None
        self.waves += 1


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that an endpoint asks to wait, by Retry-After (seconds or a date, RFC 9110) or retry-after-ms.

    A date is held against the endpoint's own Date, where it says one: clocks here may be wrong, or be set meanwhile.

    Args:
        headers: names in small letters, or found so.
        now: seconds since 1970, by the clock here.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            value = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        return value if 0 <= value < _LONGEST_ASKED_S else None
    until, there = _date(headers, "retry-after"), _date(headers, "date")
    if until is None:
        return None
    here = time.time() if now is None else now
    value = max(0.0, until - (here if there is None else there))
    return value if value < _LONGEST_ASKED_S else None  # nobody means a year, but clocks may be wrong


def _date(headers: Mapping[str, str], name: str) -> float | None:
    try:
        return parsedate_to_datetime(headers[name]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
