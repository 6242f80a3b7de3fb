"""Asks a server of its own many mixed questions, and compares its tokens with those that are computed offline.

    python tools/compare_served.py runs/demo --out docs/benchmarks/served_demo.json
    python tools/compare_served.py RELEASE --dtype bf16 --requests 50
    python tools/compare_served.py RELEASE --engine vllm --draft none

Conversations and raw texts, greedy and seeded, of different lengths, with stop strings, penalties, biases,
log-probabilities and gate weights, whole and as streams. Offline, each is answered alone and without drafts, as by
``ultrafuser generate``. The server gets them so many at a time, with and without drafts. In float32 the tokens must be
the same; exit code 1 where they are not, and in any dtype where an answer has no 200. What differs is listed with the
place of the first other token and, of greedy answers without penalties, how far apart (in nats) the two likeliest
tokens were there: sums in another order, as other rows beside it bring them, decide between tokens nearly as likely.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from server_process import CHAT, COMPLETIONS, running

from ultrafuser_mega.files import write_atomically
from ultrafuser_mega.inference.answer import Answerer
from ultrafuser_mega.inference.embedded import Serving
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.requests import FailedEvent, PromptEvent, Request
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.models.dtypes import parse_dtype
from ultrafuser_mega.serving.grammar import Vocabulary

WORDS = (
    "Which",
    "city",
    "is",
    "the",
    "largest?",
    "London,",
    "Rome",
    "Ines",
    "buys",
    "8",
    "apples.",
    "Write",
    "a",
    "list",
)


def mixed(count: int) -> list[dict[str, Any]]:
    """Bodies of requests; the same number, the same ones."""
    draw = random.Random(7)
    bodies = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.choice([3, 10, 40])))
        body: dict[str, Any] = {
            "seed": number,
            "max_tokens": draw.randint(1, 32),
            "temperature": draw.choice([0.0, 0.0, 0.7, 1.0, 1.3]),
            "stream": draw.random() < 0.5,
            "ignore_eos": draw.random() < 0.3,
            "gate_weights": draw.random() < 0.3,
        }
        if draw.random() < 0.3:
            body |= {"top_k": 20, "top_p": 0.9}
        if draw.random() < 0.2:
            body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "300": 2}}
        if draw.random() < 0.4:
            body["stop"] = draw.choice(["e", ".", ["the", "\n"]])
        if draw.random() < 0.3:
            bodies.append({**body, "prompt": text, "logprobs": draw.choice([0, 2])})
        else:
            bodies.append({**body, "messages": [{"role": "user", "content": text}], "logprobs": True})
    return bodies


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        text: of it.
        tokens: the bytes of each; of the raw texts, as the server writes it.
        gaps: offline alone: of each token, the nats between the two likeliest.
    """

    text: str
    tokens: list[str]
    gaps: list[float]


def offline(opened: OpenedModel, bodies: Sequence[dict[str, Any]]) -> list[Said]:
    """Their answers, one after the other."""
    answerer = Answerer(opened, Serving(rows=1, draft=0))
    rows, lead = opened.model.config.vocab_size, opened.model.config.response_lead
    vocabulary = Vocabulary(opened.tokenizer, rows, opened.eos, lead)
    return [_alone(opened, answerer, vocabulary, body) for body in bodies]


def _alone(opened: OpenedModel, answerer: Answerer, vocabulary: Vocabulary, body: dict[str, Any]) -> Said:
    raw = "prompt" in body
    request = Request(
        id="alone",
        prompt=answerer.encode_raw(body["prompt"]) if raw else answerer.encode(body["messages"]),
        sampling=Sampling(
            temperature=body["temperature"],
            seed=body["seed"],
            **{
                name: body[name]
                for name in ("top_k", "top_p", "frequency_penalty", "repetition_penalty")
                if name in body
            },
            logit_bias={int(token): value for token, value in body.get("logit_bias", {}).items()},
        ),
        max_new_tokens=body["max_tokens"],
        eos=frozenset() if body["ignore_eos"] else opened.eos,
        top_logprobs=2,
    )
    stop = body.get("stop", ())
    answerer.engine.submit(request, stop=(stop,) if isinstance(stop, str) else tuple(stop), lead=not raw)
    while True:
        for event in answerer.engine.step():
            if isinstance(event, FailedEvent):
                raise RuntimeError(event.message)
            if isinstance(event, PromptEvent) or event.answer is None:
                continue
            tokens = event.answer.tokens
            gaps = [token.top[0][1] - token.top[1][1] if token.top else 0.0 for token in tokens]
            return Said(event.answer.text, [_written(vocabulary, token.id, raw) for token in tokens], gaps)


def _written(vocabulary: Vocabulary, token: int, raw: bool) -> str:
    """A token as the server shows it."""
    return vocabulary.text(token) if raw else vocabulary.bytes(token).hex()


def served(port: int, body: dict[str, Any]) -> tuple[int, Said | None]:
    """The status and the answer of the server at ``port``."""
    raw = "prompt" in body
    connection = HTTPConnection("127.0.0.1", port, timeout=1200)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", COMPLETIONS if raw else CHAT, json.dumps(body), headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    if response.status != 200:
        return response.status, None
    if body["stream"]:
        events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
    else:
        events = [json.loads(content)]
    text, tokens = "", list[str]()
    for event in events:
        choice = event["choices"][0]
        if raw:
            text += choice["text"]
            tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        else:
            text += choice["delta" if body["stream"] else "message"].get("content", "")
            shown = choice["logprobs"]["content"] if choice["logprobs"] else []
            tokens += [bytes(token["bytes"]).hex() for token in shown]
    return 200, Said(text, tokens, [])


def compared(bodies: Sequence[dict[str, Any]], wanted: Sequence[Said], found: Sequence[Said | None]) -> dict[str, Any]:
    """How many are other, of greedy and of seeded ones, and where."""
    places: list[dict[str, Any]] = []
    for number, (body, right, own) in enumerate(zip(bodies, wanted, found, strict=True)):
        # Bytes that are no UTF-8 read otherwise once others follow, and a stream has shown them by then.
        if own is None or (own.tokens == right.tokens and (own.text == right.text or "\ufffd" in right.text)):
            continue
        pairs = enumerate(zip(right.tokens, own.tokens, strict=False))
        at = next((place for place, (a, b) in pairs if a != b), min(len(right.tokens), len(own.tokens)))
        greedy = body["temperature"] == 0
        plain = greedy and "logit_bias" not in body  # else the choice is between other numbers
        gap = round(right.gaps[at], 5) if plain and at < len(right.gaps) else None
        places.append({"request": number, "greedy": greedy, "token": at, "nats between the likeliest": gap})
    return {"other": len(places), "other greedy": sum(place["greedy"] for place in places), "where": places}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--draft", nargs="+", default=["0", "4"], help="of the server; none: leave the option out")
    parser.add_argument("--engine", default="embedded", help="embedded or vllm")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    bodies = mixed(options.requests)
    begun = time.monotonic()
    with opened_model(options.model, "cpu", options.dtype) as opened:
        wanted = offline(opened, bodies)
    tokens, greedy = sum(len(one.tokens) for one in wanted), sum(body["temperature"] == 0 for body in bodies)
    near = [gap for one, body in zip(wanted, bodies, strict=True) if body["temperature"] == 0 for gap in one.gaps]
    report: dict[str, Any] = {
        "requests": options.requests,
        "greedy": greedy,
        "tokens": tokens,
        "dtype": options.dtype,
        "engine": options.engine,
        "median nats between the two likeliest, greedy": round(statistics.median(near), 4),
        "runs": [],
    }
    print(f"{options.requests} answers, {tokens} tokens, offline in {time.monotonic() - begun:.0f} s", flush=True)
    held = True
    for draft in options.draft:
        more = [] if draft == "none" else ["--draft", draft]
        with running(options.model, "--engine", options.engine, "--dtype", options.dtype, *more) as server:
            for clients in options.concurrency:
                begun = time.monotonic()
                with ThreadPoolExecutor(clients) as pool:
                    answers = list(pool.map(lambda body: served(server.port, body), bodies))
                run = {"draft": draft, "concurrency": clients}
                run |= {"answered": sum(status == 200 for status, _ in answers)}
                run |= compared(bodies, wanted, [said for _, said in answers])
                run["seconds"] = round(time.monotonic() - begun, 1)
                report["runs"].append(run)
                held = held and run["answered"] == len(bodies)
                held = held and (run["other"] == 0 or parse_dtype(options.dtype) is not parse_dtype("fp32"))
                print(json.dumps(run), flush=True)
            held = server.rest() and server.end() == 0 and held
    if options.out:
        write_atomically(options.out, json.dumps(report, indent=1) + "\n")
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
