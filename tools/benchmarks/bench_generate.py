"""How fast a fused model answers, beside transformers' models of its specialists called one after the other.

    python tools/benchmarks/bench_generate.py RELEASE_OR_CHECKPOINT --out docs/benchmarks/generate.json

All variants decode the same number of tokens behind the same prompts, greedily, past EOS:

    models in turn         for every token one call of each specialist's transformers model with its dynamic cache,
                           which is what no fused decoding avoids: the floor of the ratios
    answers in turn        transformers' generate() of one specialist after the other; weights that fit into a CPU's
                           cache stay there for a whole answer, which no fused decoding can have
    release generate()     the fused model through transformers
    ultrafuser generate    this package's engine, without drafts

Rounds are interleaved; read the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.inference.embedded import cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.model import opened_model
from ultrafuser_mega.inference.requests import Prompt, Request
from ultrafuser_mega.inference.sampling import Sampling

FLOOR = "models in turn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="release folder or checkpoint")
    parser.add_argument("--device", default="auto", help="as for ultrafuser generate")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with opened_model(str(arguments.model), arguments.device, arguments.dtype) as opened, torch.inference_mode():
        runs = [measure(opened.model, b, arguments) for b in arguments.batch_sizes]
        places = {name: str(next(opened.model.specialists[name].parameters()).device) for name in opened.model.names}
    show(runs)
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        report = {"torch": torch.__version__, "machine": machine, "devices": places, "runs": runs}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {arguments.out}")


def measure(model: Any, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of every variant, and its ratio to the floor."""
    new, length = arguments.new_tokens, arguments.prompt_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    seconds = timed(variants(model, ids, new), arguments.rounds)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        "batch": batch,
        "prompt_tokens": length,
        "new_tokens": new,
        "variants": {
            name: {
                "seconds": medians[name],
                "tokens_per_s": batch * new / medians[name],
                "ratio": statistics.median(a / b for a, b in zip(s, seconds[FLOOR], strict=True)),
            }
            for name, s in seconds.items()
        },
    }


def variants(model: Any, ids: torch.Tensor, new: int) -> dict[str, Callable[[], None]]:
    """What decodes ``new`` tokens behind the prompts ``ids`` (batch, length), each in its way."""
    prompts: list[Prompt] = [dict.fromkeys(model.names, row) for row in ids.tolist()]
    tokens = cache_tokens(model, len(prompts))
    options = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}

    def models_in_turn() -> None:
        own = {name: model.specialists[name] for name in model.names}
        caches = {name: DynamicCache(config=own[name].config) for name in own}
        tokens = {name: ids.to(own[name].device) for name in own}
        for _ in range(new):
            for name in own:
                logits = own[name](tokens[name], past_key_values=caches[name], logits_to_keep=1).logits
                tokens[name] = logits[:, -1:].argmax(dim=-1)

    def generate(generating: Any) -> None:
        tokens = ids.to(generating.device)
        sequences = generating.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert sequences.shape[1] == ids.shape[1] + new

    def answers_in_turn() -> None:
        for name in model.names:
            generate(model.specialists[name])

    def ours() -> None:
        engine = EmbeddedEngine(model, tokens=tokens, rows=len(prompts), chunk=ids.numel())
        for row, prompt in enumerate(prompts):
            engine.submit(Request(str(row), prompt, Sampling(), new, frozenset(), row))
        while not engine.idle:
            engine.step()
        assert engine.stats().tokens == len(prompts) * new

    found = {FLOOR: models_in_turn, "answers in turn": answers_in_turn, "ultrafuser generate": ours}
    if len({next(model.specialists[name].parameters()).device for name in model.names}) == 1:
        found["release generate()"] = lambda: generate(model)
    return found


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in each of so many rounds, which take turns; a round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("batch", "variant", "seconds", "tokens/s", f"x {FLOOR}")
    for run in runs:
        for name, found in run["variants"].items():
            numbers = f"{found['seconds']:.3f}", f"{found['tokens_per_s']:.1f}", f"{found['ratio']:.2f}"
            table.add_row(str(run["batch"]), name, *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
