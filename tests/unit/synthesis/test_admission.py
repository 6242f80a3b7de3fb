"""The gate over a clock that a test moves."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from itertools import pairwise

import pytest

from ultrafuser_mega.synthesis.admission import Gate, retry_after_s


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def enter(gate: Gate, clock: Clock, number: int) -> list[float]:
    return [await gate.enter() for _ in range(number)]


def test_a_wave_halves_the_limit_once_and_answers_raise_it_again() -> None:
    async def play() -> None:
        clock = Clock()
        gate = Gate(16, clock=clock)
        left = await enter(gate, clock, 16)
        clock.now += 1
        for at in left:  # all of them left before the limit was halved
            gate.turned_away(at, 0.0)
            await gate.leave()
        assert (gate.limit, gate.waves) == (8, 1)
        clock.now += 1
        gate.turned_away((await enter(gate, clock, 1))[0], 0.0)
        await gate.leave()
        assert (gate.limit, gate.waves) == (4, 2)
        for _ in range(200):
            gate.answered(1.0, 10)
        assert gate.limit == 16

    asyncio.run(play())


def test_one_request_at_least_may_be_under_way() -> None:
    async def play() -> None:
        clock = Clock()
        gate = Gate(4, clock=clock)
        for _ in range(9):
            (at,) = await enter(gate, clock, 1)
            gate.turned_away(at, 0.0)
            await gate.leave()
            clock.now += 1
        assert gate.limit == 1
        await asyncio.wait_for(gate.enter(), 5)

    asyncio.run(play())


def test_nothing_leaves_before_the_time_that_the_endpoint_names() -> None:
    async def play() -> None:
        gate = Gate(4)
        left = await gate.enter()
        gate.turned_away(left, 0.15)
        await gate.leave()
        entered = await gate.enter()
        assert entered - left >= 0.15

    asyncio.run(play())


def test_no_more_than_the_limit_are_under_way() -> None:
    async def play() -> None:
        gate, most = Gate(3), 0

        async def work() -> None:
            nonlocal most
            await gate.enter()
            most = max(most, gate.running)
            await asyncio.sleep(0)
            await gate.leave()

        await asyncio.gather(*(work() for _ in range(50)))
        assert most == 3 and gate.running == 0

    asyncio.run(play())


def test_requests_a_minute_are_kept() -> None:
    async def play() -> None:
        gate = Gate(8, per_minute=1200)
        entered = [await gate.enter() for _ in range(4)]
        assert all(later - earlier >= 0.05 for earlier, later in pairwise(entered))

    asyncio.run(play())


def windows(gate: Gate, clock: Clock, number: int, seconds: float, rate: float) -> None:
    """Full windows of replies of 100 tokens, each after ``seconds``, ``rate`` tokens a second in all."""
    for _ in range(number * 8):
        clock.now += 100 / rate
        gate.answered(seconds, 100)


def test_a_host_that_queues_is_asked_less() -> None:
    clock = Clock()
    gate = Gate(8, clock=clock)
    windows(gate, clock, 3, seconds=1.0, rate=800.0)
    assert gate.limit == 8
    windows(gate, clock, 1, seconds=3.0, rate=800.0)  # three times as slow, and no more comes
    assert gate.limit == 6 and gate.waves == 1


def test_a_host_that_serves_more_at_once_more_slowly_is_not() -> None:
    clock = Clock()
    gate = Gate(8, clock=clock)
    windows(gate, clock, 3, seconds=1.0, rate=800.0)
    windows(gate, clock, 3, seconds=3.0, rate=1600.0)
    assert gate.limit == 8 and gate.waves == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": formatdate(1_000_030, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0),
        # by the endpoint's clock, where it says it: here it is an hour later, or a year earlier
        ({"retry-after": formatdate(996_430, usegmt=True), "date": formatdate(996_400, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(32_536_030, usegmt=True), "date": formatdate(32_536_000, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(1_000_030, usegmt=True), "date": "once"}, 30.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "86400"}, None),  # longer than is believed, as is a date
        ({"retry-after": formatdate(1_000_000 + 365 * 86400, usegmt=True)}, None),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -2359"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, now=1_000_000) == seconds


def test_a_clock_that_is_set_neither_shortens_nor_lengthens_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(jump: float) -> float:
        gate = Gate(1, per_minute=600)
        began = time.monotonic()
        await gate.enter()
        gate.turned_away(began, 0.3)
        await gate.leave()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + jump)
        await asyncio.wait_for(gate.enter(), 20)
        await gate.leave()
        await asyncio.wait_for(gate.enter(), 20)  # a tenth of a second later, as 600 a minute have it
        return time.monotonic() - began

    for jump in (-1e6, 1e6):
        assert asyncio.run(play(jump)) >= 0.4


def test_a_run_that_is_over_waits_for_no_pause() -> None:
    async def play() -> None:
        gate = Gate(2)
        gate.turned_away(await gate.enter(), 3600.0)
        await gate.leave()
        waiting = asyncio.create_task(gate.enter())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        gate.hurry()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(play())
