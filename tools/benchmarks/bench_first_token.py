"""How long a short question waits for its first token, and answers under way for their next, beside a long prompt.

    python tools/benchmarks/bench_first_token.py MODEL PROMPTS.jsonl --out docs/benchmarks/first_token.json

PROMPTS has rows as ``ultrafuser generate --input`` takes them. Some of them are being answered when a prompt as long as
the model's positions allow comes in, and one more short question right behind it. The ways take turns in every round:
the long prompt read in pieces of so many tokens, or whole. Seconds on a CPU are of this process alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_drafting import clock, machine
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.answer import Answerer
from ultrafuser_mega.inference.batch import PromptFile
from ultrafuser_mega.inference.embedded import Serving, cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.lanes import positions_of
from ultrafuser_mega.inference.model import OpenedModel, opened_model
from ultrafuser_mega.inference.requests import Prompt, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling

_ANSWER = 200  # tokens, at most, of those under way
_WARM = 5  # tokens that they have when the long prompt comes


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="release, checkpoint or run")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--device", default="auto", help="as for ultrafuser generate")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512, 1_000_000], help="tokens of a piece")
    parser.add_argument("--running", type=int, default=8, help="answers under way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=result_file, help="JSON file to write")
    arguments = parser.parse_args()
    with opened_model(arguments.model, arguments.device, arguments.dtype) as opened:
        prompts = PromptFile(arguments.prompts).encode(Answerer(opened, Serving(rows=1)), None)
        if len(prompts) < arguments.running + 1:
            raise InputError(f"{arguments.prompts}: {len(prompts)} rows; --running {arguments.running} takes one more")
        found: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in arguments.chunks}
        for _ in range(arguments.rounds + 1):  # the first one warms up
            for chunk, own in found.items():
                own.append(waited(opened, prompts, arguments.running, chunk))
        longest = min(positions_of(opened.model).values()) - 2
    runs = [
        {"chunk": chunk} | {name: statistics.median(one[name] for one in own[1:]) for name in own[0]}
        for chunk, own in found.items()
    ]
    show(runs, longest)
    if arguments.out:
        write_json(arguments.out, machine() | {"running": arguments.running, "long_prompt": longest, "runs": runs})
        print(f"wrote {arguments.out}")


def waited(opened: OpenedModel, prompts: Sequence[Prompt], running: int, chunk: int) -> dict[str, float]:
    """Seconds: to the short question's first token, the longest between two steps meanwhile, to the long prompt's."""
    rows = running + 2
    engine = EmbeddedEngine(opened.model, opened.rule, tokens=cache_tokens(opened.model, rows), rows=rows, chunk=chunk)
    for row in range(running):
        engine.submit(_request(opened, str(row), prompts[row], _ANSWER))
    chosen = 0
    while chosen < running * _WARM:
        chosen += len(engine.step())
    longest = min(positions_of(opened.model).values()) - 2
    ids = {name: (list(own) * longest)[:longest] for name, own in prompts[0].items()}
    engine.submit(_request(opened, "long", ids, 1))
    engine.submit(_request(opened, "short", prompts[running], 1))
    began = before = clock()
    first: dict[str, float] = {}
    gap = 0.0
    while {"short", "long"} - set(first):
        events = engine.step()
        now = clock()
        gap, before = max(gap, now - before), now
        first |= {event.id: now - began for event in events if isinstance(event, TokenEvent) and event.id not in first}
    return {"short": first["short"], "gap": gap, "long": first["long"]}


def _request(opened: OpenedModel, id: str, prompt: Prompt, new: int) -> Request:
    return Request(id, prompt, Sampling(), new, frozenset() if new > 1 else opened.eos, 0)


def show(runs: Sequence[dict[str, Any]], longest: int) -> None:
    table = Table(
        "pieces of", "first token of a short question, s", "answers wait at most, s", f"of {longest} tokens, s"
    )
    for run in runs:
        table.add_row(str(run["chunk"]), *(f"{run[name]:.2f}" for name in ("short", "gap", "long")))
    Console(width=120).print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
