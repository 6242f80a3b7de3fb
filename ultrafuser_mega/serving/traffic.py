"""Answers on their way: how many there may be, their events, what they cost, and how they end when the server does."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ultrafuser_mega.inference.requests import FailedEvent, PromptEvent
from ultrafuser_mega.inference.text_engine import TextEvent
from ultrafuser_mega.serving.errors import ApiError, bad_field, unavailable
from ultrafuser_mega.serving.metrics import Metrics
from ultrafuser_mega.serving.served import Wanted
from ultrafuser_mega.serving.shapes import reason
from ultrafuser_mega.serving.worker import Refused, ServedEvent, Worker

_LOG = logging.getLogger(__name__)
_ENDING = "the server is shutting down"


class Traffic:
    """All answers under way; lives in the event loop.

    Args:
        worker: the engine's.
        metrics: get every token.
        most: answers that may be under way or wait at a time.
    """

    def __init__(self, worker: Worker, metrics: Metrics, most: int) -> None:
        self.worker, self._metrics, self._most = worker, metrics, most
        self._underway = 0
        self._ending = False
        self._queues: set[asyncio.Queue[tuple[int, ServedEvent]]] = set()
        self._usual = 1.0  # seconds that an answer takes
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def refusal(self) -> str | None:
        """Why nothing new is answered; None: it is."""
        return self.worker.failure or (_ENDING if self._ending else None)

    def admit(self, answers: int) -> None:
        """ApiError where so many answers are too many now, or the server ends."""
        if (refusal := self.refusal) is not None:
            raise unavailable(refusal)
        if answers > self._most:
            raise bad_field("n", f"{answers} answers; this server has room for {self._most} at a time")
        if self._underway + answers > self._most:
            wait = str(min(max(math.ceil(self._usual), 1), 60))
            raise ApiError(
                429,
                f"{self._underway} answers are under way or wait, {self._most} may; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": wait},
            )

    async def answers(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, TextEvent | PromptEvent], None]:
        """(place in ``wanted``, event) until all are answered; what is not is cancelled when the iterator is closed.

        Raises:
            ApiError: the server is full or ends, the engine refuses or fails one; the others are cancelled.
        """
        self.admit(len(wanted))
        events: asyncio.Queue[tuple[int, ServedEvent]] = asyncio.Queue()  # at most the tokens of the answers
        begun = time.monotonic()
        last = [begun] * len(wanted)
        counts = [0] * len(wanted)
        left = set(range(len(wanted)))
        outcome = "abort"
        self._underway += len(wanted)
        self._queues.add(events)
        self._empty.clear()
        try:
            for place, one in enumerate(wanted):
                self.worker.submit(one, lambda event, place=place: events.put_nowait((place, event)))  # type: ignore[misc]
            while left:
                place, event = await events.get()
                if isinstance(event, Refused):
                    raise ApiError(400, event.message)
                if isinstance(event, FailedEvent):
                    outcome = "error"
                    if self.refusal is not None:
                        raise unavailable(event.message)
                    raise ApiError(500, event.message, code="engine_error")
                if isinstance(event, TextEvent):
                    now = time.monotonic()
                    self._metrics.token(event.token.weights, now - last[place], first=not counts[place])
                    last[place] = now
                    counts[place] += 1
                    if event.answer is not None:
                        left.discard(place)
                        self._count(reason(event.answer), wanted[place], counts[place], now - begun)
                yield place, event
        finally:
            for place in left:
                self.worker.cancel(wanted[place].request.id)
                self._count(outcome, wanted[place], counts[place], time.monotonic() - begun)
            self._queues.discard(events)
            self._underway -= len(wanted)
            if not self._underway:
                self._empty.set()

    def _count(self, outcome: str, wanted: Wanted, tokens: int, seconds: float) -> None:
        prompt = len(next(iter(wanted.request.prompt.values())))
        self._metrics.answer(outcome, prompt, tokens, seconds)
        self._usual += 0.1 * (seconds - self._usual)

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what is under way finish, and end it when the time is over."""
        self._ending = True
        _LOG.info("draining: %d answers are under way; they have %g s", self._underway, seconds)
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            _LOG.warning("%d answers did not finish in time and are given up", self._underway)
            self.give_up()

    def give_up(self) -> None:
        """End all answers now; their clients are told."""
        self._ending = True
        for events in self._queues:
            events.put_nowait((0, FailedEvent("", _ENDING)))


async def all_answers(traffic: Traffic, wanted: Sequence[Wanted]) -> tuple[list[TextEvent], dict[int, PromptEvent]]:
    """The last event of every answer, and those of the prompts by place."""
    ends: dict[int, TextEvent] = {}
    prompts: dict[int, PromptEvent] = {}
    async with aclosing(traffic.answers(wanted)) as events:
        async for place, event in events:
            if isinstance(event, PromptEvent):
                prompts[place] = event
            elif event.answer is not None:
                ends[place] = event
    return [ends[place] for place in range(len(wanted))], prompts
