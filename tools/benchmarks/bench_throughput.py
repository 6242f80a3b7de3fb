"""How many tokens a second the engine answers with many requests at a time, beside fixed batches.

    python tools/benchmarks/bench_throughput.py MODEL PROMPTS.jsonl --out docs/benchmarks/throughput.json

PROMPTS has rows as ``ultrafuser generate --input`` takes them; each may get an answer of 1 to --longest tokens, drawn
once, greedily. The ways take turns in every round: fixed batches of 8 (what ``generate`` did) and of 32
(``fixed_batches``), and the engine with 32 requests under way, without drafts and with those that pay. Times on a CPU
are of this process alone. Answers are compared with those of fixed batches of 8.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_drafting import answers_of, clock, machine
from fixed_batches import answer_batch
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer
from ultrafuser_mega.inference.batch import PromptFile
from ultrafuser_mega.inference.embedded import Serving, cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.requests import Prompt, Request
from ultrafuser_mega.inference.sampling import Sampling

WAYS = ("fixed 8", "fixed 32", "engine 32", "engine 32, drafts")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="release, checkpoint or run")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--device", default="auto", help="as for ultrafuser generate")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=result_file, help="JSON file to write")
    arguments = parser.parse_args()
    with opened_model(arguments.model, arguments.device, arguments.dtype) as opened:
        prompts = PromptFile(arguments.prompts).encode(Answerer(opened, Serving(rows=1)), None)
        source = random.Random(0)
        lengths = [source.randint(1, arguments.longest) for _ in prompts]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        answers: dict[str, list[list[int]]] = {}
        for _ in range(arguments.rounds + 1):  # the first one warms up
            for way, found in seconds.items():
                began = clock()
                answers[way] = answered(opened, prompts, lengths, way)
                found.append(clock() - began)
    runs = [
        {
            "way": way,
            "tokens": sum(map(len, answers[way])),
            "tokens_per_s": sum(map(len, answers[way])) / statistics.median(seconds[way][1:]),
            "speed": statistics.median(a / b for a, b in zip(seconds[WAYS[0]][1:], seconds[way][1:], strict=True)),
            "equal": sum(map(list.__eq__, answers[way], answers[WAYS[0]])),
        }
        for way in WAYS
    ]
    show(runs)
    if arguments.out:
        write_json(arguments.out, machine() | {"requests": len(prompts), "runs": runs})
        print(f"wrote {arguments.out}")


def answered(opened: OpenedModel, prompts: Sequence[Prompt], lengths: Sequence[int], way: str) -> list[list[int]]:
    """All prompts, in one way."""
    kind, number, *drafts = way.replace(",", "").split()
    rows = int(number)
    if kind == "fixed":
        answers = []
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            answers += answer_batch(opened.model, prompts[part], lengths[part], opened.eos)
        return answers
    tokens = cache_tokens(opened.model, rows)
    engine = EmbeddedEngine(opened.model, opened.rule, tokens=tokens, rows=rows, draft=4 if drafts else 0)
    rows_of = enumerate(zip(prompts, lengths, strict=True))
    return answers_of(
        engine, [Request(str(row), prompt, Sampling(), length, opened.eos, row) for row, (prompt, length) in rows_of]
    )


def show(runs: Sequence[dict[str, Any]]) -> None:
    table = Table("way", "tokens", "tokens/s", "speed", "equal")
    for run in runs:
        numbers = str(run["tokens"]), f"{run['tokens_per_s']:.0f}", f"{run['speed']:.2f} x", str(run["equal"])
        table.add_row(run["way"], *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
