"""A server of this process, on a port of its own, for tests that talk to it as clients do."""

from __future__ import annotations

import asyncio
import json
import threading
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from ultrafuser_mega.inference.model import OpenedModel
from ultrafuser_mega.inference.text_engine import TextEngine
from ultrafuser_mega.serving.keys import Keys
from ultrafuser_mega.serving.server import Front, Settings, listen


class LiveServer:
    """Serves from a thread until ``stop``.

    Attributes:
        port: where.
        failure: what ``Front.run`` returned.
    """

    def __init__(self, opened: OpenedModel, engine: TextEngine, *, keys: tuple[str, ...] = (), **settings: Any) -> None:
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.failure: str | None = None
        self._settings = Settings("127.0.0.1", self.port, "toy", Keys(list(keys)), **{"drain": 5.0, **settings})
        self._started = threading.Event()

        async def run() -> None:
            self.front = Front(opened, engine, self._settings)
            self._loop = asyncio.get_running_loop()
            self._started.set()
            self.failure = await self.front.run(listener)

        self._thread = threading.Thread(target=lambda: asyncio.run(run()))
        self._thread.start()
        assert self._started.wait(60)

    def ask_to_stop(self) -> None:
        """As a signal does."""
        self._loop.call_soon_threadsafe(self.front.stop)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        """Both, at once."""
        if self._thread.is_alive():
            self.ask_to_stop()
            self.ask_to_stop()
        self.join()

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> HTTPResponse:
        """A request whose response is still to be read; ``body`` is sent as JSON unless it is bytes."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, raw, {"Content-Type": "application/json", **(headers or {})})
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and decoded JSON of a POST, or of a GET where there is no body."""
        with self.open("GET" if body is None else "POST", path, body, headers) as response:
            return response.status, json.loads(response.read())

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, the last one, "[DONE]", as text."""
        with self.open("POST", path, {**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            lines = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
        data = [line.removeprefix("data: ") for line in lines]
        return [text if text == "[DONE]" else json.loads(text) for text in data]
