"""The thread that computes: takes requests up, steps the engine, hands every event to the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.requests import EngineStats, FailedEvent, PromptEvent
from ultrafuser_mega.inference.text_engine import TextEngine, TextEvent
from ultrafuser_mega.serving.served import Wanted

_LOG = logging.getLogger(__name__)
_LOOK_EVERY = 0.1  # seconds between two looks at the engine's numbers while it is busy


@dataclass(frozen=True)
class Refused:
    """The engine never takes a request; ``message`` says why."""

    id: str
    message: str


ServedEvent = TextEvent | PromptEvent | FailedEvent | Refused
Sink = Callable[[ServedEvent], None]


class Worker:
    """One engine in a thread of its own.

    Args:
        engine: nobody else uses it from now on.
        on_end: is called in the event loop where the engine fails as a whole, with what happened.

    Attributes:
        stats: how the engine was doing a moment ago.
        failure: what ended it; None: it lives.
    """

    def __init__(self, engine: TextEngine, on_end: Callable[[str], None] = lambda failure: None) -> None:
        self._engine, self._on_end = engine, on_end
        self._commands: queue.SimpleQueue[Wanted | str | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats: EngineStats = engine.engine.stats()
        self._looked = 0.0
        self.failure: str | None = None

    def start(self) -> None:
        """Begin; in the event loop that gets the events."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """End behind the step that runs."""
        self._commands.put(None)
        self._thread.join(timeout)

    def submit(self, wanted: Wanted, sink: Sink) -> None:
        """Ask for an answer; its events come to ``sink``, in the event loop."""
        if self.failure is not None:
            sink(FailedEvent(wanted.request.id, self.failure))
            return
        self._sinks[wanted.request.id] = sink
        self._commands.put(wanted)

    def cancel(self, id: str) -> None:
        """No event of ``id`` comes any more, and what it holds is free after the step that runs."""
        if self._sinks.pop(id, None) is not None:
            self._commands.put(id)

    def _run(self) -> None:
        try:
            while self._obey():
                if not self._engine.idle:
                    self._step()
                self._look()
        except BaseException as error:
            failure = f"the engine ended: {_told(error)}"
            _LOG.error("%s", failure, exc_info=error)
            self._tell(lambda: self._end(failure))

    def _obey(self) -> bool:
        """Take up what was asked for; waits where there is nothing to do. False: to end."""
        wait = self._engine.idle
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if command is None:
                return False
            if isinstance(command, str):
                self._engine.cancel(command)
                continue
            try:
                self._engine.submit(command.request, stop=command.stop, lead=command.lead)
            except InputError as error:
                self._deliver([Refused(command.request.id, str(error))])

    def _step(self) -> None:
        try:
            self._deliver(self._engine.step())
        except Exception as error:
            if not _no_memory(error):
                raise
            # The engine is empty now and can go on.
            _LOG.error("no memory for a step: every answer under way is given up (%s)", _told(error))
            self._tell(lambda: self._fail("the server had no memory left for this answer"))

    def _look(self) -> None:
        now = time.monotonic()
        if self._engine.idle or now - self._looked >= _LOOK_EVERY:
            self.stats, self._looked = self._engine.engine.stats(), now

    def _deliver(self, events: list[TextEvent | PromptEvent | FailedEvent] | list[Refused]) -> None:
        if events:
            self._tell(lambda: self._hand_out(events))

    def _hand_out(self, events: list[TextEvent | PromptEvent | FailedEvent] | list[Refused]) -> None:
        for event in events:
            sink = self._sinks.get(event.id)
            if sink is None:  # cancelled meanwhile
                continue
            if isinstance(event, FailedEvent | Refused) or (isinstance(event, TextEvent) and event.answer is not None):
                del self._sinks[event.id]
            sink(event)

    def _fail(self, message: str) -> None:
        for id, sink in list(self._sinks.items()):
            self.cancel(id)  # the engine may not have it yet
            sink(FailedEvent(id, message))

    def _end(self, failure: str) -> None:
        self.failure = failure
        self._fail(failure)
        self._on_end(failure)

    def _tell(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop is closed: nobody listens
            _LOG.debug("events for nobody")


def _no_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
