"""One rank of a training job as torchrun starts it: the command line of ``examples/pretrain_fuser.py``."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ultrafuser_mega.cli.options import Config, Overrides, Requeue, Resume
from ultrafuser_mega.runtime.quiet import quiet_dependencies

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def _train(
    context: typer.Context,
    overrides: Overrides = None,
    config: Config = None,
    resume: Resume = False,
    requeue: Requeue = False,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="--requeue, on as many of the ranks as a layout is for; the others wait")
    ] = False,
) -> None:
    """Fuse specialists into one model: stage 1 trains the gate, stage 2 everything.

    \b
      torchrun --nproc-per-node 8 examples/pretrain_fuser.py
      torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml stage2.steps=1000 dtype=bf16
      torchrun --nproc-per-node 8 examples/pretrain_fuser.py --config my.yaml --resume

    Without --config it runs the embedded default: three toy specialists, made on first use, on generated text / code /
    math data. The ranks of all nodes together choose among the configuration's layouts. Every key of the configuration
    can be overridden as key.sub=value.

    Results go to runs/<name>: metrics.jsonl, TensorBoard events, checkpoints, plots, and at the end results.md and
    summary.json. `ultrafuser plan` checks a configuration and shows what every rank would hold, without training.
    """
    from ultrafuser_mega.launch.rank import train_main

    context.obj.close()
    code = train_main(config, overrides or [], resume, requeue, elastic, _answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter down takes seconds, in which a launcher loses patience


def _answer(model: str, prompts: Any, **options: Any) -> dict[int, list[int]]:
    from ultrafuser_mega.inference.answer_ids import answer_ids  # transformers' models: a run that asks none needs none

    return answer_ids(model, prompts, **options)


def main() -> None:
    """Every rank reads the command line; what there is to say about it, rank 0 says alone."""
    quiet_dependencies()
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as quiet:
        if not first:
            nowhere = quiet.enter_context(Path(os.devnull).open("w"))
            quiet.enter_context(redirect_stdout(nowhere))
            quiet.enter_context(redirect_stderr(nowhere))
        try:
            app(prog_name="pretrain_fuser.py", obj=quiet)
        except SystemExit as end:
            if end.code and not first:
                time.sleep(10)  # the launcher ends the job with the first rank that exits: let that be rank 0
            raise


if __name__ == "__main__":
    main()
