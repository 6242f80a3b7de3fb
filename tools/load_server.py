"""Loads a server of its own, and looks at what it answers.

    python tools/load_server.py MODEL flood --requests 500 --memory 0.05
    python tools/load_server.py MODEL leavers --requests 100
    python tools/load_server.py MODEL restart
    python tools/load_server.py MODEL soak --minutes 60 --plot docs/images/serving_memory.png

flood: so many requests at once; every one must be answered, or refused with 429 and when to come back. leavers: clients
that hang up in mid-stream must leave the others' answers unchanged. restart: SIGTERM must let answers finish and end
with 0; after kill -9 a new server must answer as before. soak: mixed load, leavers and bad requests, memory by the
minute; at its end nothing may be under way. Each prints a line of JSON; exit code 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

CHAT = "/v1/chat/completions"
QUESTIONS = ("Which city?", "Ines buys 8 apples. How many?", "Write a function that adds two numbers.", "Say hello.")


class Server:
    """``ultrafuser serve`` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-c", "from ultrafuser_mega.cli import main; main()", "serve", model, "--port", "0"]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
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


def body(number: int, *, longest: int = 32, stream: bool = False) -> dict[str, Any]:
    """A question; the same number, the same answer."""
    draw = random.Random(number)
    return {
        "messages": [{"role": "user", "content": draw.choice(QUESTIONS)}],
        "max_tokens": draw.randint(1, longest),
        "temperature": draw.choice([0.0, 1.0]),
        "seed": number,
        "stream": stream,
        "logit_bias": dict.fromkeys(map(str, range(3, 259)), -100),  # no single bytes, whose text may change
    }


def flood(model: str, requests: int, memory: float | None) -> dict[str, Any]:
    options = [] if memory is None else ["--memory", str(memory)]
    with running(model, *options) as server:
        begun, before = time.monotonic(), server.mib()
        with ThreadPoolExecutor(requests) as pool:
            answers = list(pool.map(lambda number: server.ask(body(number)), range(requests)))
        statuses = Counter(status for status, _ in answers)
        waits = all(wait for status, wait in answers if status == 429)
        held = server.rest() and server.end() == 0 and set(statuses) <= {200, 429} and waits
        seconds = round(time.monotonic() - begun, 1)
        return {"held": held, "statuses": dict(statuses), "seconds": seconds, "MiB before": before}


def leavers(model: str, requests: int) -> dict[str, Any]:
    with running(model) as server:
        stayers = range(20)
        alone = [server.ask(body(number))[1] for number in stayers]
        with ThreadPoolExecutor(requests + len(stayers)) as pool:
            leaving = [
                pool.submit(
                    server.ask, {**body(number, stream=True), "max_tokens": 100, "ignore_eos": True}, read=False
                )
                for number in range(1000, 1000 + requests)
            ]
            beside = list(pool.map(lambda number: server.ask(body(number, stream=number % 2 == 0))[1], stayers))
            left = Counter(one.result()[0] for one in leaving)
        unchanged = beside == alone
        held = unchanged and server.rest() and server.end() == 0
        return {"held": held, "others unchanged": unchanged, "left": dict(left)}


def restart(model: str) -> dict[str, Any]:
    with ThreadPoolExecutor(16) as pool:
        with running(model) as server:
            asked = [{**body(number), "max_tokens": 200, "ignore_eos": True} for number in range(8)]
            alone = [server.ask(one)[1] for one in asked]
            under_way = [pool.submit(server.ask, {**one, "stream": True}) for one in asked]
            server.begun()
            code = server.end()
            drained = [one.result() for one in under_way]
        with running(model) as server:
            lost = [pool.submit(server.ask, one) for one in asked]
            server.begun()
            killed = server.end(signal.SIGKILL)
            failed = sum(one.exception() is not None for one in lost)
        with running(model) as server:
            again = [server.ask(one)[1] for one in asked]
            server.end()
    # What came in before the signal is answered; what came behind it is told so.
    finished = sum(status == 200 for status, _ in drained)
    whole = all(text == alone[place] for place, (status, text) in enumerate(drained) if status == 200)
    held = code == 0 and finished > 0 and whole and again == alone and killed == -signal.SIGKILL
    return {"held": held, "exit after SIGTERM": code, "drained": finished, "lost to kill -9": failed}


def soak(model: str, minutes: float, plot: Path | None, clients: int) -> dict[str, Any]:
    end = time.monotonic() + 60 * minutes
    statuses: Counter[str] = Counter()

    def client(place: int, server: Server) -> None:
        draw = random.Random(place)
        while time.monotonic() < end:
            asked = body(draw.randrange(10**6), stream=draw.random() < 0.5)
            kind = draw.random()
            if kind < 0.1:
                server.ask({**asked, "stream": True, "max_tokens": 100, "ignore_eos": True}, read=False)
                statuses["left"] += 1
            elif kind < 0.2:
                statuses[str(server.ask({**asked, "temperature": -1})[0])] += 1
            else:
                statuses[str(server.ask(asked)[0])] += 1

    with running(model) as server:
        memory: list[tuple[float, int, int]] = []
        begun = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(client, place, server) for place in range(clients)]
            while not all(one.done() for one in working):
                process = psutil.Process(server.process.pid)
                memory.append(((time.monotonic() - begun) / 60, server.mib(), process.num_fds()))
                time.sleep(min(5.0, minutes * 2))
            for one in working:
                one.result()
        held = server.rest() and set(statuses) <= {"200", "400", "429", "left"} and server.end() == 0
    if plot is not None:
        draw_memory(memory, plot)
    third = len(memory) // 3
    return {
        "held": held,
        "requests": dict(statuses),
        "MiB at a third": memory[third][1],
        "MiB at the end": memory[-1][1],
        "handles at most": max(handles for _, _, handles in memory),
    }


def draw_memory(memory: list[tuple[float, int, int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([minute for minute, _, _ in memory], [mib for _, mib, _ in memory])
    axes.set(xlabel="minutes", ylabel="memory of the server, MiB", ylim=(0, None))
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("what", choices=["flood", "leavers", "restart", "soak"])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--memory", type=float, help="GiB for caches, of flood")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    os.environ.pop("ULTRAFUSER_API_KEY", None)
    if options.what == "flood":
        found = flood(options.model, options.requests, options.memory)
    elif options.what == "leavers":
        found = leavers(options.model, options.requests)
    elif options.what == "restart":
        found = restart(options.model)
    else:
        found = soak(options.model, options.minutes, options.plot, options.clients)
    print(json.dumps({"what": options.what, **found}))
    return int(not found["held"])


if __name__ == "__main__":
    sys.exit(main())
