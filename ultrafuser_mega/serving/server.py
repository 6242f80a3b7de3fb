"""The process: listens, tells ready from not, and ends in order: SIGTERM lets answers finish, a second one does not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Generator
from dataclasses import dataclass

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.text_engine import TextEngine
from ultrafuser_mega.serving.app import Parts, make_app
from ultrafuser_mega.serving.keys import Keys
from ultrafuser_mega.serving.metrics import Metrics
from ultrafuser_mega.serving.served import Served
from ultrafuser_mega.serving.traffic import Traffic
from ultrafuser_mega.serving.worker import Worker

_LOG = logging.getLogger(__name__)
_HEADER_SECONDS = 30  # for a client that connected to ask something
_CLOSING = 5  # seconds for responses that are written to reach their clients
EXIT_ENGINE = 1


@dataclass(frozen=True)
class Settings:
    """How the server runs.

    Attributes:
        host, port: where it listens; port 0: any free one.
        name: of the model, for clients.
        keys: that open it.
        most: answers that may be under way or wait at a time.
        largest_body: bytes.
        drain: seconds for answers to finish when the server ends.
    """

    host: str
    port: int
    name: str
    keys: Keys
    most: int = 512
    largest_body: int = 4 << 20
    drain: float = 60.0


class _PromptProtocol(H11Protocol):
    """uvicorn's own, which would wait for ever for a client that connects and asks nothing, or half a header."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silence = self.loop.call_later(_HEADER_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """Whose signals are handled by ``serve``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that will be served; raises InputError where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None


def tell_service_manager(state: str) -> None:
    """As sd_notify(3) does, where systemd or another one of its kind started this process and wants to be told."""
    if place := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.sendto(state.encode(), f"\0{place[1:]}" if place.startswith("@") else place)


class Front:
    """All that serves one model; made once, run once.

    Args:
        opened: the model.
        engine: computes its answers; the front's from now on.
        settings: how to run.

    Attributes:
        traffic: the answers under way.
    """

    def __init__(self, opened: OpenedModel, engine: TextEngine, settings: Settings) -> None:
        self._settings = settings
        self._ended = asyncio.Event()
        self._worker = Worker(engine, lambda failure: self._ended.set())
        served = Served(opened, settings.name, self._worker.stats.total)
        metrics = Metrics(settings.name, served.names)
        self.traffic = Traffic(self._worker, metrics, settings.most)
        self._app = make_app(Parts(served, self.traffic, metrics, settings.keys, settings.largest_body))
        self._asked = 0

    def stop(self) -> None:
        """End in order; asked a second time, at once. In the event loop."""
        self._asked += 1
        self._ended.set()
        if self._asked > 1:
            self.traffic.give_up()

    async def run(self, listener: socket.socket) -> str | None:
        """Answer until ``stop``, or until the engine ends; returns why it did, None where it did not."""
        config = uvicorn.Config(
            self._app,
            http=_PromptProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSING,
        )
        server = _Server(config)
        self._worker.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ending = asyncio.create_task(self._ended.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if self._worker.failure is None:
            await self.traffic.drain(self._settings.drain)
        server.should_exit = True
        await serving
        self._worker.stop()
        return self._worker.failure


def serve(opened: OpenedModel, engine: TextEngine, listener: socket.socket, settings: Settings) -> int:
    """Answer until a signal comes, or the engine ends.

    Args:
        opened, engine, settings: see ``Front``.
        listener: see ``listen``.

    Returns:
        The exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 where the engine ended.
    """
    signals: list[int] = []

    async def run() -> str | None:
        front = Front(opened, engine, settings)
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            signals.append(number)
            tell_service_manager("STOPPING=1")
            front.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        host, port = listener.getsockname()[:2]
        _LOG.info("serving %s at http://%s:%d", settings.name, f"[{host}]" if ":" in host else host, port)
        tell_service_manager("READY=1")
        return await front.run(listener)

    if (failure := asyncio.run(run())) is not None:
        _LOG.error("%s", failure)
        return EXIT_ENGINE
    return 128 + signal.SIGINT if signals[:1] == [signal.SIGINT] else 0
