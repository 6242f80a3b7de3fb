"""``ultrafuser serve`` in a process of its own, for the tools that load it, attack it and compare what it answers."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import psutil

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Server:
    """``ultrafuser serve`` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "ultrafuser_mega", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving .* at http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError("".join(self.log))
        self._reader = ThreadPoolExecutor(1)
        self._reader.submit(lambda: self.log.extend(self.process.stderr or ()))

    def ask(self, body: dict[str, Any], *, read: bool = True) -> tuple[int, Any]:
        """Status, and the answer's text, or the header Retry-After of a refusal."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if not read:  # a little, and away
            response.read(40)
            if connection.sock is not None:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            connection.close()
            return response.status, None
        raw = response.read()
        connection.close()
        if response.status != 200:
            return response.status, response.headers["Retry-After"]
        if body.get("stream"):
            events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: {")]
            deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
            return 200, "".join(deltas)
        return 200, json.loads(raw)["choices"][0]["message"]["content"]

    def numbers(self) -> dict[str, float]:
        """Of /metrics, by name; the largest of the specialists'."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        found: dict[str, float] = {}
        for line in connection.getresponse().read().decode().splitlines():
            if match := re.match(r"ultrafuser:(\w+)\{.*\} (\S+)$", line):
                found[match[1]] = max(found.get(match[1], 0.0), float(match[2]))
        connection.close()
        return found

    def rest(self) -> bool:
        """Whether nothing is under way any more; waits a minute for it."""
        for _ in range(600):
            numbers = self.numbers()
            left = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if not any(numbers.get(name, 0) for name in left):
                return True
            time.sleep(0.1)
        return False

    def begun(self) -> None:
        """Wait until it computes an answer."""
        while not self.numbers().get("num_requests_running"):
            time.sleep(0.01)

    def mib(self) -> int:
        """Its memory."""
        return psutil.Process(self.process.pid).memory_info().rss >> 20

    def handles(self) -> int:
        """Files and sockets that it has open."""
        return psutil.Process(self.process.pid).num_fds()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        code = self.process.wait(120)
        self._reader.shutdown()
        return code


@contextmanager
def running(model: str, *options: str) -> Iterator[Server]:
    """A server that is gone afterwards."""
    server = Server(model, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.end(signal.SIGKILL)
