"""An engine that says what a test has it say, token by token, for everything around engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.requests import EngineStats, Event, FailedEvent, Likely, PromptEvent, Request, TokenEvent


@dataclass
class _Row:
    request: Request
    answer: list[int]
    given: list[int] = field(default_factory=list)
    read: bool = False


class PlayedEngine:
    """Speaks :class:`~ultrafuser_mega.inference.requests.Engine`.

    Args:
        names: of the specialists.
        answer: request -> the tokens that it gets, the ending one included.
        room: tokens for each specialist.
        rows: requests under way at a time.
        pause: seconds of a step.

    Attributes:
        requests: all that were taken up.
        cancelled: ids.
        failing: is raised by the next step.
        failed: ids that get a FailedEvent.
    """

    def __init__(
        self,
        names: list[str],
        answer: Callable[[Request], list[int]],
        *,
        room: int = 256,
        rows: int = 4,
        pause: float = 0.0,
    ) -> None:
        self._names, self._answer, self._room, self._most, self._pause = names, answer, room, rows, pause
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._tokens = 0
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.failing: BaseException | None = None
        self.failed: set[str] = set()

    def submit(self, request: Request) -> None:
        longest = max(len(ids) for ids in request.prompt.values())
        if longest + request.max_new_tokens > self._room:
            raise InputError(f"a prompt of {longest} tokens does not fit into {self._room}")
        self.requests.append(request)
        self._waiting.append(_Row(request, self._answer(request)))

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)
        self._running = [row for row in self._running if row.request.id != id]
        self._waiting = [row for row in self._waiting if row.request.id != id]

    def step(self) -> list[Event]:
        time.sleep(self._pause)
        if self.failing is not None:
            failing, self.failing = self.failing, None
            self._running, self._waiting = [], []
            raise failing
        while self._waiting and len(self._running) < self._most:
            self._running.append(self._waiting.pop(0))
        events: list[Event] = []
        for row in list(self._running):
            events += self._next(row)
        return events

    def _next(self, row: _Row) -> list[Event]:
        request = row.request
        if request.id in self.failed:
            self._running.remove(row)
            return [FailedEvent(request.id, "the logits are not finite")]
        events: list[Event] = []
        if request.prompt_logprobs and not row.read:
            ids = next(iter(request.prompt.values()))
            k = request.top_logprobs or 0
            known = [Likely(-0.5 - place, [(token, -0.5 - place)][:k]) for place, token in enumerate(ids)]
            events.append(PromptEvent(request.id, [None, *known[1:]]))
        row.read = True
        place = len(row.given)
        token = row.answer[place % len(row.answer)]
        if request.constraint is not None:
            scores = torch.zeros(400)
            request.constraint.mask(scores)
            token = int(scores.argmax()) if place % 3 else int(scores.flip(0).argmax().neg() + 399)
            request.constraint.accept(token)
        row.given.append(token)
        finish = "eos" if token in request.eos else "length" if place + 1 == request.max_new_tokens else None
        if finish is not None:
            self._running.remove(row)
        share = 0.7 if len(self._names) > 1 else 1.0
        others = (1 - share) / max(len(self._names) - 1, 1)
        weights = [share if i == place % len(self._names) else others for i in range(len(self._names))]
        most = request.top_logprobs
        top = None if most is None else [(token, -0.1), (5, -2.5), (6, -3.5)][:most]
        self._tokens += 1
        events.append(TokenEvent(request.id, token, weights, None if most is None else -0.1, top, finish))  # type: ignore[arg-type]
        return events

    @property
    def idle(self) -> bool:
        return not (self._running or self._waiting)

    def stats(self) -> EngineStats:
        used = sum(len(row.given) for row in self._running)
        return EngineStats(
            free=dict.fromkeys(self._names, self._room - used),
            total=dict.fromkeys(self._names, self._room),
            running=len(self._running),
            waiting=len(self._waiting),
            tokens=self._tokens,
            prompt_tokens=dict.fromkeys(self._names, 0),
            prefix_hits=dict.fromkeys(self._names, 0),
        )
