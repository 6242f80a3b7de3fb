"""``ultrafuser evaluate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.errors import InputError

_HELP_MODELS = """models of the table, [NAME=]ADDRESS: a release, a checkpoint, a run, runs/demo@math (one specialist),
runs/demo+uniform (mixed by another rule), a model's folder (@TEMPLATE), openai:MODEL@URL"""


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=_HELP_MODELS, show_default=False)],
    data: Annotated[Path, typer.Option(help="folder of the benchmarks' files as published", show_default=False)],
    suite: Annotated[str, typer.Option(help="paper, standard, quick, toy, or benchmarks: gsm8k,math")] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="folder of the results; default: evaluations/SUITE", show_default=False)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="so many questions of each benchmark, drawn by --seed", show_default=False)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="shorter replies than the benchmarks allow", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the draw of --limit and of the intervals")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="prompts that are answered at once")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or one per specialist")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16; default: as stored", show_default=False)] = None,
    judge: Annotated[
        str | None, typer.Option(help="openai:MODEL[@URL], or file:PATH of replies made elsewhere", show_default=False)
    ] = None,
    judge_price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="READ WRITTEN", help="per million tokens: the cost is shown", show_default=False),
    ] = None,
    opponent: Annotated[
        str | None,
        typer.Option(help="row that AlpacaEval's answers are compared with; default: the file's", show_default=False),
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="ROW,ROW: a row more, the answer the judge finds best", show_default=False)
    ] = None,
    oracle: Annotated[
        str | None, typer.Option(help="ROW,ROW: a row more, the answer with the best score", show_default=False)
    ] = None,
    single: Annotated[
        str | None,
        typer.Option(
            help="row of one model, as a further-tuned one: who recovers how much from it to --oracle",
            show_default=False,
        ),
    ] = None,
    code_sandbox: Annotated[str, typer.Option(help="where a model's programs run: bwrap, docker, none")] = "bwrap",
    ranks: Annotated[
        int, typer.Option(min=1, help="processes, one GPU each where there are GPUs, that share the questions")
    ] = 1,
) -> None:
    """Benchmarks of the paper's table 1, models beside each other.

    \b
      ultrafuser evaluate runs/demo runs/demo@text runs/demo@code runs/demo@math --suite toy --data toy/data
      ultrafuser evaluate my_release base=/models/Llama-2-13b-chat-hf --suite paper --data benchmarks
      torchrun --nproc-per-node 8 -m ultrafuser_mega evaluate my_release --suite paper --data benchmarks

    Zero-shot, greedy, the prompts of the paper's table 10 in each specialist's own template; the suite "standard" is
    asked and scored by lm-evaluation-harness, in its own words. OUT receives every answer (samples.jsonl), the table
    with intervals (results.md), all settings (results.json) and plots. Interrupted, the same command goes on where it
    was; more models or benchmarks can be added to a folder later.
    """
    if judge is None and (select or opponent or judge_price):
        raise InputError("--select, --opponent, --judge-price: belong to --judge; give one")
    if single is not None and not oracle:
        raise InputError("--single: the headroom from it goes to --oracle; give that too")
    out = out or Path("evaluations") / suite.replace(",", "-")
    again = f"what was answered is in {out}; the same command goes on"
    if ranks > 1 and "RANK" not in os.environ:
        from ultrafuser_mega.launch.local import launch_local

        program = ["-m", "ultrafuser_mega", *_without_ranks(sys.argv[1:])]
        raise typer.Exit(launch_local(ranks, program, lambda _: again))

    from rich.console import Console

    from ultrafuser_mega.evaluation.contestants import Computing
    from ultrafuser_mega.evaluation.job import Job, Judging, evaluate_share

    job = Job(
        models=models,
        suite=suite,
        data=data,
        out=out,
        limit=limit,
        seed=seed,
        computing=Computing(batch_size, device, dtype),
        max_new_tokens=max_new_tokens,
        code_sandbox=code_sandbox,
        judging=Judging(judge, judge_price, opponent, _names(select)),
        oracle=_names(oracle),
        single=single,
    )
    try:
        evaluate_share(job, Console(stderr=True))
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr, flush=True)
        os._exit(130)  # threads may still wait for an endpoint


def _without_ranks(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ranks":
            skip = True
        elif not argument.startswith("--ranks="):
            kept.append(argument)
    return kept


def _names(text: str | None) -> list[str]:
    return text.split(",") if text else []
