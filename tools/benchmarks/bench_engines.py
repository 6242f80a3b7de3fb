"""How fast the engines answer: vLLM, a process for each specialist, beside the embedded engine with and without drafts.

    python tools/benchmarks/bench_engines.py RELEASE_OR_RUN --out docs/benchmarks/engines.json     (vLLM beside it)

All answer the same requests, prompts of 8 to ``--prompt-tokens`` random tokens for each specialist, greedily and past
EOS, so many at a time. Rounds are interleaved; read the ratios. Beside the clock's time stands the processors', of this
process and all of vLLM's: on cores that others use as well it is the one to read. Answers that differ between engines
are counted: in float32 there should be none but where two tokens are as likely but for rounding.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from bench_drafting import machine
from rich.console import Console
from rich.table import Table
from scripting import Parser, result_file, write_json

from ultrafuser_mega.inference.embedded import cache_tokens
from ultrafuser_mega.inference.engine import EmbeddedEngine
from ultrafuser_mega.inference.model import described_model, opened_model
from ultrafuser_mega.inference.requests import Engine, Request, TokenEvent
from ultrafuser_mega.inference.sampling import Sampling
from ultrafuser_mega.inference.vllm.engine import VllmEngine
from ultrafuser_mega.inference.vllm.placing import Placing

PLAIN, DRAFTS, VLLM = "embedded", "embedded, drafts", "vLLM"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", help="release folder, checkpoint or run")
    parser.add_argument("--device", default="auto", help="of the embedded engine, as for ultrafuser generate")
    parser.add_argument("--vllm-device", default="auto", help="of the vLLM engine; + joins tensor parallel ranks")
    parser.add_argument("--dtype", default=None, help="fp32, bf16 or fp16; default: as stored")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2, help="for each of the answers at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=result_file, help="JSON file to write")
    arguments = parser.parse_args()
    most = max(arguments.concurrency)
    began = time.perf_counter()
    with (
        described_model(arguments.model, arguments.dtype) as described,
        VllmEngine(arguments.model, described, Placing(arguments.vllm_device, most)) as vllm,
        opened_model(arguments.model, arguments.device, arguments.dtype) as opened,
    ):
        start = time.perf_counter() - began
        print(f"vLLM and the model in memory: {start:.0f} s", flush=True)
        tokens = cache_tokens(opened.model, most)
        engines: dict[str, Engine] = {
            PLAIN: EmbeddedEngine(opened.model, tokens=tokens, rows=most),
            DRAFTS: EmbeddedEngine(opened.model, tokens=tokens, rows=most, draft=4),
            VLLM: vllm,
        }
        runs = [measure(engines, opened.model, at_a_time, arguments) for at_a_time in arguments.concurrency]
    show(runs)
    if arguments.out:
        cores = {"cores": len(os.sched_getaffinity(0))}
        settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "model")}
        write_json(arguments.out, machine() | cores | {"settings": settings, "runs": runs})


def measure(engines: Mapping[str, Engine], model: Any, at_a_time: int, arguments: Any) -> dict[str, Any]:
    """Tokens per second of every engine with so many answers at a time, and how many answers are not the first's."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    other = dict.fromkeys(engines, 0)
    for turn in range(arguments.rounds + 1):
        requests = made(model, at_a_time * arguments.requests, arguments, seed=turn)
        answers = {}
        for name, engine in engines.items():
            began, used = time.perf_counter(), processor_seconds()
            answers[name] = answered(engine, requests, at_a_time)
            took, used = time.perf_counter() - began, processor_seconds() - used
            if turn:  # the first round warms up
                seconds[name].append(took)
                processor[name].append(used)
            rate = len(requests) * arguments.new_tokens / took
            which = f"round {turn}" if turn else "warm-up"
            print(f"{at_a_time} at a time, {which}: {name}, {rate:.0f} tokens/s, {used / took:.2f} cores", flush=True)
        for name, found in answers.items():
            other[name] += sum(found[id] != answers[PLAIN][id] for id in found)
    tokens = at_a_time * arguments.requests * arguments.new_tokens
    return {
        "concurrency": at_a_time,
        "answers": (arguments.rounds + 1) * at_a_time * arguments.requests,
        "tokens_per_second": {name: [tokens / s for s in taken] for name, taken in seconds.items()},
        "tokens_per_processor_second": {name: [tokens / s for s in used] for name, used in processor.items()},
        "other_answers": other,
    }


def made(model: Any, count: int, arguments: Any, seed: int) -> list[Request]:
    """Requests that no engine has seen."""
    draw = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(8, arguments.prompt_tokens + 1, (1,), generator=draw))
        return torch.randint(3, model.config.vocab_size, (length,), generator=draw).tolist()

    return [
        Request(str(row), {name: ids() for name in model.names}, Sampling(), arguments.new_tokens, frozenset(), row)
        for row in range(count)
    ]


def answered(engine: Engine, requests: list[Request], at_a_time: int) -> dict[str, list[int]]:
    """Request -> its tokens; as one ends another begins."""
    waiting, under_way = list(reversed(requests)), 0
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    while waiting or not engine.idle:
        while waiting and under_way < at_a_time:
            engine.submit(waiting.pop())
            under_way += 1
        for event in engine.step():
            if not isinstance(event, TokenEvent):
                raise RuntimeError(str(event))
            answers[event.id].append(event.token)
            under_way -= event.finish is not None
    return answers


def processor_seconds() -> float:
    """Of this process and all that it started."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def show(runs: list[dict[str, Any]]) -> None:
    """The medians, and each engine's ratios to the embedded one without drafts, round by round."""
    table = Table(
        *("at a time", "engine", "tokens/s", "times embedded", "tokens/processor s", "times embedded", "other answers")
    )
    for run in runs:
        for name in run["other_answers"]:
            columns = []
            for rates in (run["tokens_per_second"], run["tokens_per_processor_second"]):
                ratio = statistics.median(own / plain for own, plain in zip(rates[name], rates[PLAIN], strict=True))
                columns += [f"{statistics.median(rates[name]):.0f}", f"{ratio:.2f}"]
            others = f"{run['other_answers'][name]} of {run['answers']}"
            table.add_row(str(run["concurrency"]), name, *columns, others)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
