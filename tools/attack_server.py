"""Sends a server hostile requests and looks at what is left of it.

    ultrafuser serve MODEL 2> server.log &
    python tools/attack_server.py http://127.0.0.1:8000 --count 10000 --pid PID --log server.log

Random and hostile bodies (wrong types, sizes, depths, encodings, lone surrogates, numbers beyond every range), broken
HTTP, slow senders, sockets that are half closed or torn down while an answer comes. Every response must be one of the
server's own: an error in OpenAI's shape, nothing above 499 but a 503 of a server that ends. Afterwards nothing may be
under way, the caches must be as free as before, and, with --pid, the handles must be back; its memory is printed. With
--log, neither the key nor a word that is in every prompt may be in the server's log. Exit code 1 otherwise. A key is
taken from ULTRAFUSER_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from server_process import CHAT, COMPLETIONS

from ultrafuser_mega.files import write_atomically

PATHS = (CHAT, COMPLETIONS, "/tokenize", "/detokenize")
CANARY = "plugh7f3a"  # in prompts, and in no log
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "stream", "echo"),
    *("stream_options", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logprobs"),
    *("repetition_penalty", "logit_bias", "ignore_eos", "response_format", "gate_weights", "top_logprobs", "tokens"),
    *("tools", "suffix", "user", "\u0000", "__class__"),
)
TEXTS = (
    *(
        "",
        " ",
        "\x00",
        "a" * 5000,
        "\u202e\ufeff",
        "\U0001f9d1\u200d\U0001f680" * 50,
        "</s><s>[INST]",
        "{{7*7}}{% for %}",
    ),
    *("\ud800", "e\u0301" * 300, "\r\n\r\n", "../../etc/passwd", "\n" * 500, "\\u0000", "'; DROP TABLE x;--"),
)
NUMBERS = (0, -1, 1, 2, 0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 10**40, True, float("nan"), float("inf"))
SCHEMAS: tuple[Any, ...] = (
    *(True, False, {}, {"type": "nope"}, {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"}, {"pattern": "(a+)+$" * 50}),
    {"type": "string", "minLength": 10**9},
    {"anyOf": [{"type": "integer"}] * 2000},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"},
)


@dataclass
class Findings:
    """What came back: (what was sent, status) -> how often; and what should not have."""

    seen: Counter[tuple[str, int | str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Attacker:
    """Sends one hostile request at a time; the same seed, the same requests.

    Args:
        url: of the server.
        key: that opens it.
        seed: of what is sent.
    """

    def __init__(self, url: str, key: str | None, seed: int) -> None:
        where = urlsplit(url)
        self._place = where.hostname or "127.0.0.1", where.port or 80
        self._key = key
        self._draw = random.Random(seed)
        self.findings = Findings()
        self._kinds: list[tuple[float, Callable[[], None]]] = [
            (10, self.random_body),
            (4, self.almost_good),
            (2, self.bytes_for_json),
            (1, self.deep),
            (1, self.schema),
            (1, self.large),
            (1, self.broken_http),
            (1, self.half_closed),
            (2, self.torn_down),
            (0.3, self.slow_sender),
        ]

    def attack(self) -> None:
        """One request, of a kind that is drawn."""
        weights, kinds = zip(*self._kinds, strict=True)
        kind = self._draw.choices(kinds, weights)[0]
        try:
            kind()
        except OSError as error:
            self.findings.seen[kind.__name__, type(error).__name__] += 1

    def value(self, depth: int = 0) -> Any:
        """Any JSON."""
        draw = self._draw
        kind = draw.randrange(6 if depth < 4 else 4)
        if kind == 0:
            return None
        if kind == 1:
            return draw.choice(TEXTS)
        if kind == 2:
            return draw.choice(NUMBERS)
        if kind == 3:
            return {"role": draw.choice(["user", "system", "tool", "\x00"]), "content": draw.choice(TEXTS)}
        if kind == 4:
            return [self.value(depth + 1) for _ in range(draw.randrange(4))]
        return {draw.choice(FIELDS): self.value(depth + 1) for _ in range(draw.randrange(4))}

    def good(self) -> tuple[str, dict[str, Any]]:
        """A request that is fine, and short."""
        if self._draw.random() < 0.5:
            return CHAT, {"messages": [{"role": "user", "content": f"{CANARY}?"}], "max_tokens": 4}
        return COMPLETIONS, {"prompt": f"London {CANARY}", "max_tokens": 4}

    def random_body(self) -> None:
        body = {name: self.value() for name in self._draw.sample(FIELDS, self._draw.randrange(8))}
        self.send("random_body", self._draw.choice(PATHS), json.dumps(body).encode("utf-8", "surrogatepass"))

    def almost_good(self) -> None:
        path, body = self.good()
        body[self._draw.choice(FIELDS)] = self.value()
        self.send("almost_good", path, json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    def bytes_for_json(self) -> None:
        path, body = self.good()
        raw = bytearray(json.dumps(body).encode(self._draw.choice(["utf-8", "utf-16", "utf-32"])))
        for _ in range(self._draw.randrange(4)):
            raw[self._draw.randrange(len(raw))] = self._draw.randrange(256)
        self.send("bytes_for_json", path, bytes(raw))

    def deep(self) -> None:
        depth = self._draw.choice([100, 1000, 100_000])
        opening, closing = self._draw.choice([("[", "]"), ('{"a":', "}")])
        raw = '{"messages": ' + opening * depth + "1" + closing * depth + "}"
        self.send("deep", CHAT, raw.encode())

    def schema(self) -> None:
        path, body = self.good()
        schema = self._draw.choice([*SCHEMAS, self.value()])
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        self.send("schema", path, json.dumps(body).encode("utf-8", "surrogatepass"))

    def large(self) -> None:
        path = self._draw.choice(PATHS)
        text = self._draw.choice(["a", "\u00e9 ", "\n", "[1,"]) * self._draw.choice([10_000, 300_000, 3_000_000])
        self.send("large", path, json.dumps({"prompt": text, "messages": text, "tokens": text}).encode())

    def broken_http(self) -> None:
        head = self._draw.choice(
            [
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                b"GET / HTTP/9.9\r\n\r\n",
                b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
                b"POST "
                + CHAT.encode()
                + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
                b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
                b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
                bytes(self._draw.randrange(256) for _ in range(200)),
            ]
        )
        with socket.create_connection(self._place, timeout=30) as connection:
            connection.sendall(head)
            connection.shutdown(socket.SHUT_WR)
            self.note("broken_http", connection.recv(65536), shaped=False)

    def half_closed(self) -> None:
        with socket.create_connection(self._place, timeout=30) as connection:
            connection.sendall(self.request(*self.long_stream()))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
            self.findings.seen["half_closed", "closed"] += 1

    def torn_down(self) -> None:
        with socket.create_connection(self._place, timeout=30) as connection:
            raw = self.request(*self.long_stream())
            if self._draw.random() < 0.3:
                raw = raw[: self._draw.randrange(len(raw))]
            else:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            connection.sendall(raw)
            time.sleep(self._draw.random() * 0.05)
            self.findings.seen["torn_down", "left"] += 1

    def slow_sender(self) -> None:
        raw = self.request(*self.good())
        with socket.create_connection(self._place, timeout=30) as connection:
            for place in range(0, len(raw), 40):
                connection.sendall(raw[place : place + 40])
                time.sleep(0.02)
            self.note("slow_sender", connection.recv(65536))

    def long_stream(self) -> tuple[str, bytes]:
        body = {"messages": [{"role": "user", "content": CANARY}], "stream": True, "ignore_eos": True}
        return CHAT, json.dumps({**body, "max_tokens": 60, "n": self._draw.randrange(1, 3)}).encode()

    def request(self, path: str, body: Any) -> bytes:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        key = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{key}"
        return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw

    def send(self, kind: str, path: str, body: bytes) -> None:
        """A whole request, and its response."""
        with socket.create_connection(self._place, timeout=60) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
                connection.sendall(self.request(path, body))
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            self.note(kind, b"".join(parts), sent=body)

    def note(self, kind: str, response: bytes, *, sent: bytes = b"", shaped: bool = True) -> None:
        """Look at a response: who made it, and is it named."""
        head, _, body = response.partition(b"\r\n\r\n")
        words = head.split(maxsplit=2)
        status: int | str = int(words[1]) if len(words) > 1 and words[1].isdigit() else "nothing"
        self.findings.seen[kind, status] += 1
        bad = isinstance(status, int) and status >= 500 and status != 503
        if isinstance(status, int) and status >= 400 and shaped:
            try:
                bad = bad or set(json.loads(body)["error"]) != {"message", "type", "param", "code"}
            except (ValueError, KeyError, TypeError):
                bad = True
        if bad:
            self.findings.wrong.append(f"{kind}: {response[:400]!r} to {sent[:200]!r}")


def numbers(attacker: Attacker) -> dict[str, float]:
    """What the server says of itself."""
    with socket.create_connection(attacker._place, timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b""
        while part := connection.recv(65536):
            text += part
    values: dict[str, float] = {}
    for line in text.decode().splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(("ultrafuser:num_requests", "ultrafuser:kv_cache")):
            values[name] = float(value)
    return values


def at_rest(attacker: Attacker) -> dict[str, float]:
    """The same, when nothing is under way any more, or after a minute."""
    for _ in range(600):
        values = numbers(attacker)
        if not any(values.values()):
            break
        time.sleep(0.1)
    return values


def attack(
    url: str,
    count: int,
    *,
    key: str | None = None,
    seed: int = 0,
    clients: int = 8,
    pid: int | None = None,
    log: Path | None = None,
) -> tuple[Findings, dict[str, Any]]:
    """Send ``count`` requests; what came back, and what is left; see the command's arguments."""
    attackers = [Attacker(url, key, seed + place) for place in range(clients)]
    process = psutil.Process(pid) if pid else None

    def run(share: int, attacker: Attacker) -> None:
        for _ in range(share):
            attacker.attack()

    def held() -> dict[str, int]:
        return {"handles": process.num_fds(), "mib": process.memory_info().rss >> 20} if process else {}

    with ThreadPoolExecutor(clients) as pool:
        list(
            pool.map(run, [max(count // 10, clients) // clients] * clients, attackers)
        )  # what the first ones bring stays
        at_rest(attackers[0])
        before = held()
        list(pool.map(run, [count // clients] * clients, attackers))
    under_way = at_rest(attackers[0])
    time.sleep(0.5)
    whole = Findings()
    for attacker in attackers:
        whole.seen.update(attacker.findings.seen)
        whole.wrong += attacker.findings.wrong
    if any(under_way.values()):
        whole.wrong.append(f"something is left: {under_way}")
    after = held()
    if process and after["handles"] > before["handles"] + 2:
        whole.wrong.append(f"handles: {before['handles']} before, {after['handles']} after")
    if log is not None:
        text = log.read_text(errors="replace")
        whole.wrong += [f"{log} holds {what}" for what in (CANARY, key) if what and what in text]
    return whole, {"before": before, "after": after, "at rest": under_way}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pid", type=int, help="of the server, to look at its handles and memory")
    parser.add_argument("--log", type=Path, help="what the server wrote, to look for keys and prompts in")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    begun = time.monotonic()
    findings, left = attack(
        options.url,
        options.count,
        key=os.environ.get("ULTRAFUSER_API_KEY"),
        seed=options.seed,
        clients=options.clients,
        pid=options.pid,
        log=options.log,
    )
    seconds = round(time.monotonic() - begun)
    for (kind, status), times in sorted(findings.seen.items(), key=str):
        print(f"{kind:16} {status!s:24} {times}")
    print(f"{sum(findings.seen.values())} requests in {seconds} s; {json.dumps(left)}")
    if options.out:
        seen = [[kind, status, times] for (kind, status), times in sorted(findings.seen.items(), key=str)]
        report = {"seed": options.seed, "seconds": seconds, "wrong": findings.wrong, **left, "seen": seen}
        write_atomically(options.out, json.dumps(report) + "\n")
    for wrong in findings.wrong[:20]:
        print(f"WRONG {wrong}", file=sys.stderr)
    return int(bool(findings.wrong))


if __name__ == "__main__":
    sys.exit(main())
