"""What drafting by the leading specialist saves: forward passes and time per token, beside the same engine without.

    python tools/benchmarks/bench_drafting.py MODEL PROMPTS.jsonl --out docs/benchmarks/drafting.json

PROMPTS has rows as ``ultrafuser generate --input`` takes them. Every length of draft answers the same requests,
greedily and drawn, a number of them at a time; the lengths take turns in every round, so read the ratios. Times on a
CPU are of this process alone. Answers are compared token for token with those without drafts. ``passes`` are forward
passes of specialists for each token behind an answer's first, of which there are n without drafts. ``weights`` are the
bytes that these read, a specialist's whole but for the rows of its embedding; where reading them is what takes the
time, as on a GPU with few answers at a time and all specialists on it, ``predicted`` is how much faster that is.

``adapt`` shortens drafts by what they were seen to cost (the default of the commands, of up to 8). ``cos`` is the
published way to draft for an ensemble (Fu et al., ICML 2025), see ``alternating_drafts``; its draws are others, which
are not compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from alternating_drafts import answer_alternating
from bench_mixture_ce import cpu_model
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer
from ultrafuser_mega.inference.batch import PromptFile
from ultrafuser_mega.inference.embedded import Serving, cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.requests import Prompt, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling


@dataclass(frozen=True)
class Found:
    """What one way to draft gave: of one round.

    Attributes:
        answers: tokens of every prompt's.
        passes: of all specialists, for each token behind the first ones.
        weights: bytes that these read.
        accepted: drafts that became part of an answer, of all.
        seconds: for all, prompts included.
    """

    answers: list[list[int]]
    passes: float
    weights: float
    accepted: float
    seconds: float


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="release, checkpoint or run")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--device", default="auto", help="as for ultrafuser generate")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument(
        "--drafts", nargs="+", default=["1", "2", "3", "4", "6", "8", "adapt"], help="lengths, adapt, cosK"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=result_file, help="JSON file to write")
    arguments = parser.parse_args()
    with opened_model(arguments.model, arguments.device, arguments.dtype) as opened:
        prompts = PromptFile(arguments.prompts).encode(Answerer(opened, Serving(rows=1)), None)
        runs = [
            run
            for temperature in arguments.temperatures
            for batch in arguments.batches
            for run in compared(opened, prompts, temperature, batch, arguments)
        ]
    show(runs, len(opened.model.names))
    if arguments.out:
        write_json(arguments.out, machine() | {"prompts": len(prompts), "runs": runs})
        print(f"wrote {arguments.out}")


def compared(
    opened: OpenedModel, prompts: Sequence[Prompt], temperature: float, batch: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Of every way to draft, beside none."""
    ways = [way for way in ["0", *arguments.drafts] if batch == 1 or not way.startswith("cos")]
    rounds: dict[str, list[Found]] = {way: [] for way in ways}
    for _ in range(arguments.rounds + 1):  # the first one warms up
        for way, found in rounds.items():
            found.append(answered(opened, prompts, way, temperature, batch, arguments.new_tokens))
    plain = rounds["0"]
    return [
        {
            "temperature": temperature,
            "batch": batch,
            "draft": way,
            "equal": None if way.startswith("cos") else sum(map(list.__eq__, found[0].answers, plain[0].answers)),
            "tokens": sum(map(len, found[0].answers)),
            **{
                name: statistics.median(value[name] for value in map(asdict, found[1:]))
                for name in ("passes", "weights", "accepted")
            },
            "predicted": statistics.median(a.weights / b.weights for a, b in zip(plain[1:], found[1:], strict=True)),
            "speed": statistics.median(
                (a.seconds / sum(map(len, a.answers))) / (b.seconds / sum(map(len, b.answers)))
                for a, b in zip(plain[1:], found[1:], strict=True)
            ),
            "tokens_per_s": statistics.median(sum(map(len, f.answers)) / f.seconds for f in found[1:]),
        }
        for way, found in rounds.items()
    ]


def answered(
    opened: OpenedModel, prompts: Sequence[Prompt], way: str, temperature: float, batch: int, new: int
) -> Found:
    """All prompts answered in one way."""
    if way.startswith("cos"):
        began = clock()
        found = answer_alternating(opened.model, prompts, int(way[3:]), temperature, new, opened.eos)
        passes = {name: count / found.behind_first for name, count in found.passes.items()}
        return Found(found.answers, *read(opened.model, passes), found.accepted, clock() - began)
    tokens = cache_tokens(opened.model, batch)
    began = clock()
    adapt = way == "adapt"
    engine = EmbeddedEngine(
        opened.model, opened.rule, tokens=tokens, rows=batch, draft=8 if adapt else int(way), adapt=adapt
    )
    sampling = Sampling(temperature, seed=5)
    answers = answers_of(
        engine, [Request(str(row), prompt, sampling, new, opened.eos, row) for row, prompt in enumerate(prompts)]
    )
    seconds, stats = clock() - began, engine.stats()
    behind_first = max(stats.tokens - len(prompts), 1) / min(batch, len(prompts))
    passes = {name: count / behind_first for name, count in stats.passes.items()}
    return Found(answers, *read(opened.model, passes), stats.accepted / max(stats.drafted, 1), seconds)


def read(model: Any, passes: Mapping[str, float]) -> tuple[float, float]:
    """All passes, and the bytes of weights that they read."""
    weights = 0.0
    for name, count in passes.items():
        specialist = model.specialists[name]
        embedding, head = specialist.get_input_embeddings().weight, specialist.get_output_embeddings().weight
        unread = 0 if embedding is head else embedding.nbytes
        weights += count * (sum(part.nbytes for part in specialist.parameters()) - unread)
    return sum(passes.values()), weights


def machine() -> dict[str, Any]:
    """What the times are of."""
    return {"torch": torch.__version__, "machine": {"processor": cpu_model(), "threads": torch.get_num_threads()}}


def answers_of(engine: EmbeddedEngine, requests: Sequence[Request]) -> list[list[int]]:
    """Tokens of all requests, asked at once."""
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        for event in engine.step():
            assert isinstance(event, TokenEvent), event
            answers[event.id].append(event.token)
    return list(answers.values())


def clock() -> float:
    """Seconds: of this process on a CPU, whatever else runs on the machine."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time() / torch.get_num_threads()


def show(runs: Sequence[dict[str, Any]], specialists: int) -> None:
    table = Table(
        *("temperature", "at a time", "draft", "accepted", f"passes ({specialists})", "predicted", "speed"),
        *("tokens/s", "equal"),
    )
    for run in runs:
        table.add_row(
            f"{run['temperature']:g}",
            str(run["batch"]),
            run["draft"],
            f"{run['accepted']:.2f}",
            f"{run['passes']:.2f}",
            f"{run['predicted']:.2f} x",
            f"{run['speed']:.2f} x",
            f"{run['tokens_per_s']:.0f}",
            str(run["equal"]),
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
