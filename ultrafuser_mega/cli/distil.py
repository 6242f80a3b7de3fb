"""``ultrafuser distil``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ultrafuser_mega.cli.options import MaxRestarts, Overrides, Ranks, Requeue, Resume


def distil(
    run: Annotated[Path, typer.Argument(help="of ultrafuser train, or a checkpoint: the teacher", show_default=False)],
    into: Annotated[str, typer.Option(help="the student: a specialist of the run, as it came, or a model's folder")],
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML file; default: what the checkpoint keeps", show_default=False),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="of the student; default: the specialist's, hf for a folder", show_default=False),
    ] = None,
    ranks: Ranks = None,
    resume: Resume = False,
    requeue: Requeue = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Train one model to be like the fused one, then export it.

    The student learns the distribution of the fused model, which is frozen, over every token of the responses:
    distil.temperature, distil.reverse (0: forward KL, 1: reverse), distil.labels (share of plain cross-entropy). What
    it learns on is mixed by shares: distil.data.own, the run's data; distil.data.prompts, its prompts answered by the
    fused model; distil.data.on_policy, its prompts answered by the student as it is every distil.refresh steps, with
    reverse KL, none of the first distil.on_policy_after steps. The result is an ordinary Hugging Face folder with the
    student's own template, which evaluate takes.

    A run like any other, named <name>-distilled-<student>: --resume goes on, its configuration is kept beside it. It
    takes as many samples as both stages of the fused run; stage2.steps=N says otherwise.

    \b
      ultrafuser distil runs/demo --into text --out distilled
      ultrafuser distil runs/demo --into text --out distilled distil.temperature=2 distil.labels=0.1 stage2.lr=1e-4
      ultrafuser distil runs/demo --into text --out distilled distil.data.on_policy=1 distil.on_policy_after=175
      ultrafuser distil runs/demo --into SmolLM2-135M --out distilled stage2.train.student=lora
    """
    from ultrafuser_mega.baselines.distilled import distilled
    from ultrafuser_mega.cli.baseline import train_and_export

    derived = distilled(run, into, template, config, overrides or [])
    train_and_export(derived, out, ranks, resume, requeue, max_restarts)
