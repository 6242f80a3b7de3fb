"""What the client of ``ultrafuser synthesize`` costs, and how soon a large ledger goes on.

    python tools/benchmarks/bench_synthesis.py overhead --url http://127.0.0.1:8081/v1 --model smollm2
    python tools/benchmarks/bench_synthesis.py resume --requests 1000000
    python tools/benchmarks/bench_synthesis.py storm --prompts 100 --retry-after 1

overhead: the same prompts, with the same number under way, straight to an engine through OpenAI's client and through
the pipeline's (ledger, gate, budget), in turn, ``--repeats`` times; tokens written per second of both and their ratio.
Without ``--url``, a server of this process that answers at once is asked: what a request costs beside the engine.
storm: an endpoint that turns 40 % of requests away (429, Retry-After) and breaks the JSON of 10 % of replies, beside
itself without faults: seconds of both, and what the endpoint and the ledger say was paid for.
resume: a ledger of so many replies is written, opened, and asked for every one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ultrafuser_mega.config.load import parse_config
from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.synthesis.client import Asker
from ultrafuser_mega.synthesis.config import SynthesisConfig
from ultrafuser_mega.synthesis.ledger import FILE, Ledger
from ultrafuser_mega.synthesis.progress import Progress
from ultrafuser_mega.synthesis.requests import Call, Form, UnreadableError

SUBJECTS = ("bread", "rivers", "clocks", "tea", "glass", "maps", "wool", "bees")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "resume", "storm"))
    parser.add_argument("--url", help="of an engine that speaks OpenAI's protocol")
    parser.add_argument("--model", default="played")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--retry-after", type=float, default=1.0, help="seconds, of a storm's 429")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="JSON file to add the numbers to")
    arguments = parser.parse_args()
    if arguments.what == "resume":
        found = resume(arguments.requests)
    else:
        found = overhead(arguments) if arguments.what == "overhead" else storm(arguments)
    found["machine"] = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    print(json.dumps(found, indent=1))
    if arguments.out is not None:
        known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
        name = "overhead_without_engine" if arguments.what == "overhead" and not arguments.url else arguments.what
        write_atomically(arguments.out, json.dumps({**known, name: found}, indent=1) + "\n")


def overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second both ways, interleaved."""
    url, server = arguments.url, None
    if url is None:
        server = _AtOnce()
        url = server.url
    rates: dict[str, list[float]] = {"straight": [], "pipeline": []}
    for repeat in range(-1, arguments.repeats):  # the first warms both up
        prompts = [f"Say something about {SUBJECTS[n % len(SUBJECTS)]}, number {n}." for n in range(arguments.prompts)]
        ways = [("straight", _straight), ("pipeline", _pipeline)]
        for name, way in ways if repeat % 2 else reversed(ways):
            began = time.perf_counter()
            tokens = asyncio.run(way(url, arguments, prompts))
            if repeat >= 0:
                rates[name].append(tokens / (time.perf_counter() - began))
    if server is not None:
        server.close()
    ratios = [through / straight for through, straight in zip(rates["pipeline"], rates["straight"], strict=True)]
    return {
        "prompts": arguments.prompts,
        "max_tokens": arguments.max_tokens,
        "concurrency": arguments.concurrency,
        "tokens_per_s": rates,
        "median": {name: statistics.median(values) for name, values in rates.items()},
        "pipeline_over_straight": {"median": statistics.median(ratios), "all": ratios},
    }


async def _straight(url: str, arguments: argparse.Namespace, prompts: Sequence[str]) -> int:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    places = iter(prompts)

    async def work() -> int:
        tokens = 0
        for place, prompt in enumerate(places):
            answer = await client.chat.completions.create(
                model=arguments.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=arguments.max_tokens,
                temperature=1.0,
                seed=place,
            )
            tokens += answer.usage.completion_tokens if answer.usage else 0
        return tokens

    counts = await asyncio.gather(*(work() for _ in range(arguments.concurrency)))
    await client.close()
    return sum(counts)


async def _pipeline(url: str, arguments: argparse.Namespace, prompts: Sequence[str], retries: int = 0) -> int:
    config = parse_config(SynthesisConfig, "benchmark", _config(url, arguments, retries))
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        asker = Asker(config, ledger, Progress(Console(quiet=True)))
        messages = [({"role": "user", "content": prompt},) for prompt in prompts]
        answers = await asker.ask_all([Call("text", "responses", one, Form(_word_list)) for one in messages])
        assert not retries or all(answer.value for answer in answers), "something came to nothing"
        await asker.close()
        written = sum(total.written for total in ledger.totals())
        ledger.close()
    return written


def _word_list(text: str) -> bool:
    if text.startswith("{"):  # what a storm breaks
        raise UnreadableError("broken")
    return True


def _config(url: str, arguments: argparse.Namespace, retries: int) -> str:
    steps = ("meta_topics", "instructions", "related", "complicated", "responses")
    step = {"model": "m", "max_tokens": arguments.max_tokens, "retries": retries}
    tree = {
        "endpoints": {"here": {"url": url, "concurrency": arguments.concurrency, "timeout_s": 600}},
        "models": {"m": {"endpoint": "here", "model": arguments.model}},
        "steps": dict.fromkeys(steps, step),
        "classes": {"text": {"domain": "d", "topics": [1], "instructions": 1}},
    }
    return json.dumps(tree)  # which is YAML as well


def storm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds with and without faults; tokens by both sides' books."""
    prompts = [f"Say something about {SUBJECTS[n % len(SUBJECTS)]}, number {n}." for n in range(arguments.prompts)]
    found: dict[str, Any] = {"prompts": len(prompts), "concurrency": arguments.concurrency}
    found["retry_after_s"] = arguments.retry_after
    for name, turned_away, broken in (("calm", 0.0, 0.0), ("storm", 0.4, 0.1)):
        server = _AtOnce(seconds=0.05, turned_away=turned_away, broken=broken, retry_after=arguments.retry_after)
        began = time.perf_counter()
        written = asyncio.run(_pipeline(server.url, arguments, prompts, retries=8))
        found[name] = {"seconds": time.perf_counter() - began, "tokens_by_ledger": written, **server.close()}
    found["seconds_ratio"] = found["storm"]["seconds"] / found["calm"]["seconds"]
    return found


def resume(number: int) -> dict[str, Any]:
    """Seconds, by the clock and of the processor, to open a ledger of ``number`` replies and to find every one."""
    with tempfile.TemporaryDirectory() as folder:
        Ledger(Path(folder)).close()
        keys = [hashlib.sha256(str(place).encode()).hexdigest()[:32] for place in range(number)]
        _fill(Path(folder) / FILE, keys)
        size = (Path(folder) / FILE).stat().st_size
        began, began_cpu = time.perf_counter(), time.process_time()
        ledger = Ledger(Path(folder))
        totals = ledger.totals()
        opened = time.perf_counter() - began
        assert sum(total.replies for total in totals) == number
        found = sum(len(ledger.find_all(keys[first : first + 500])) for first in range(0, number, 500))
        took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
        ledger.close()
    assert found == number
    return {
        "requests": number,
        "bytes": size,
        "opened_and_counted_in_s": opened,
        "resumed_in_s": took,
        "resumed_in_cpu_s": took_cpu,
    }


def _fill(path: Path, keys: Sequence[str]) -> None:
    """Replies under these keys, in one transaction, where a run would have one for each."""
    request = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Question " * 20}], "max_tokens": 512})
    text = "A reply of usual length, which says something. " * 8
    database = sqlite3.connect(path)
    call = "'text', 'responses', 'm', 'good', 'stop', 60, 80, 1, 1e-5, 'm', 1.0, 0.0, null, ?, ?, null"
    database.executemany(f"insert into call values(?, {call})", ((key, request, text) for key in keys))
    database.commit()
    database.close()


class _AtOnce:
    """An endpoint in a process of its own that answers after ``seconds``, and misbehaves by chance."""

    def __init__(
        self, seconds: float = 0.0, turned_away: float = 0.0, broken: float = 0.0, retry_after: float = 0.0
    ) -> None:
        command = [sys.executable, "-c", _SERVER, *map(str, (seconds, turned_away, broken, retry_after))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def close(self) -> dict[str, int]:
        """End it; returns what it has counted."""
        self._process.terminate()
        assert self._process.stdout is not None
        counted: dict[str, int] = json.loads(self._process.stdout.read())
        self._process.wait()
        return counted


_SERVER = """
import asyncio, json, random, signal, sys
seconds, turned_away, broken, retry_after = map(float, sys.argv[1:])
draw, count = random.Random(0), {"replies": 0, "broken": 0, "turned_away": 0, "tokens": 0}
def reply(text):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 10, "completion_tokens": 48}
    body = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()
def answer():
    if draw.random() < turned_away:
        count["turned_away"] += 1
        return 429, b'{"error": {"message": "slowly"}}'
    bad = draw.random() < broken
    count["replies"] += 1
    count["broken"] += bad
    count["tokens"] += 48
    return 200, reply('{"items": ["half' if bad else "word " * 48)
async def handle(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            lines = head.lower().split(b"\\r\\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
            await reader.readexactly(length)
            status, payload = answer()
            await asyncio.sleep(seconds if status == 200 else 0)
            head = (f"HTTP/1.1 {status} X", "content-type: application/json", f"retry-after: {retry_after:g}",
                f"content-length: {len(payload)}")
            writer.write("\\r\\n".join((*head, "", "")).encode() + payload)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    print(json.dumps(count))
asyncio.run(main())
"""


if __name__ == "__main__":
    main()
