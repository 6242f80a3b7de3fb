r"""Loads a server of its own, and looks at what it answers.

    python tools/load_server.py MODEL flood --requests 500 --memory 0.05
    python tools/load_server.py MODEL leavers --requests 100
    python tools/load_server.py MODEL restart
    python tools/load_server.py MODEL soak --minutes 60 --memory 0.05 --out docs/benchmarks/serving_soak.json \
        --plot docs/images/serving_memory.png

flood: so many requests at once; every one must be answered, or refused with 429 and when to come back. leavers: clients
that hang up in mid-stream must leave the others' answers unchanged. restart: SIGTERM must let answers finish and end
with 0; after kill -9 a new server must answer as before. soak: mixed load, leavers and bad requests, memory and handles
all the while; at its end nothing may be under way. What was read stays in the caches until --memory is used up, and
memory grows until then: give little. Each prints a line of JSON; exit code 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from server_process import Server, running

from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.reporting.canvas import panels_of, save, style
from ultrafuser_mega.reporting.palette import COLORS

QUESTIONS = ("Which city?", "Ines buys 8 apples. How many?", "Write a function that adds two numbers.", "Say hello.")


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


def budget(memory: float | None) -> list[str]:
    """The server's option."""
    return [] if memory is None else ["--memory", str(memory)]


def flood(model: str, requests: int, memory: float | None) -> dict[str, Any]:
    with running(model, *budget(memory)) as server:
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


def soak(
    model: str,
    minutes: float,
    *,
    clients: int,
    pause: float,
    memory: float | None,
    plot: Path | None,
    out: Path | None,
) -> dict[str, Any]:
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
            time.sleep(pause * 2 * draw.random())

    with running(model, *budget(memory)) as server:
        samples: list[tuple[float, int, int]] = []
        begun = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(client, place, server) for place in range(clients)]
            while not all(one.done() for one in working):
                samples.append((round((time.monotonic() - begun) / 60, 3), server.mib(), server.handles()))
                time.sleep(min(5.0, minutes * 2))
            for one in working:
                one.result()
        held = server.rest() and set(statuses) <= {"200", "400", "429", "left"}
        tokens = server.numbers().get("generation_tokens_total")
        at_rest = server.mib(), server.handles()
        held = server.end() == 0 and held
    if plot is not None:
        draw_memory(samples, plot)
    third = len(samples) // 3
    found = {
        "held": held,
        "minutes": round(samples[-1][0], 1),
        "requests": dict(sorted(statuses.items())),
        "tokens": tokens,
        "MiB at a third": samples[third][1],
        "MiB at the end": samples[-1][1],
        "handles at first": samples[0][2],
        "handles at most": max(handles for _, _, handles in samples),
        "at rest: MiB, handles": at_rest,
    }
    if out is not None:
        report = {**found, "clients": clients, "pause": pause, "memory": memory, "samples": samples}
        write_atomically(out, json.dumps(report) + "\n")
    return found


def draw_memory(samples: list[tuple[float, int, int]], path: Path) -> None:
    minutes, mib, handles = zip(*samples, strict=True)
    figure, panels = panels_of(1, 2, 2.4)
    for axes, title, values in zip(panels, ("MiB of memory", "open files and sockets"), (mib, handles), strict=True):
        style(axes, title)
        axes.plot(minutes, values, color=COLORS[0], linewidth=1)
        axes.set(xlabel="minutes", ylim=(0, 1.2 * max(values)))
    save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("what", choices=["flood", "leavers", "restart", "soak"])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--memory", type=float, help="GiB for caches, of flood and soak")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=16, help="of soak")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds, on the average, between a client's requests")
    parser.add_argument("--plot", type=Path, help="of memory and handles, of soak")
    parser.add_argument("--out", type=Path, help="JSON file of soak, with every sample")
    options = parser.parse_args()
    os.environ.pop("ULTRAFUSER_API_KEY", None)
    if options.what == "flood":
        found = flood(options.model, options.requests, options.memory)
    elif options.what == "leavers":
        found = leavers(options.model, options.requests)
    elif options.what == "restart":
        found = restart(options.model)
    else:
        found = soak(
            options.model,
            options.minutes,
            clients=options.clients,
            pause=options.pause,
            memory=options.memory,
            plot=options.plot,
            out=options.out,
        )
    print(json.dumps({"what": options.what, **found}))
    return int(not found["held"])


if __name__ == "__main__":
    sys.exit(main())
