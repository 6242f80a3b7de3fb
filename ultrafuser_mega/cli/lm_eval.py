"""``ultrafuser lm-eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def lm_eval(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(help="folder of the benchmarks' files: tasks ultrafuser_* read them", show_default=False),
    ] = None,
) -> None:
    """lm-evaluation-harness, with the model class "ultrafuser": every option of lm_eval, every task of theirs.

    \b
      ultrafuser lm-eval --model ultrafuser --model_args pretrained=runs/demo --tasks hellaswag
      ultrafuser lm-eval --model ultrafuser --model_args pretrained=my_release --apply_chat_template \\
          --tasks ultrafuser_truthfulqa_mc2,ultrafuser_gsm8k,ultrafuser_aqua,ultrafuser_sat_math --data benchmarks

    pretrained is what MODEL is to `ultrafuser evaluate`. With --apply_chat_template every specialist reads its own.
    """
    from ultrafuser_mega.evaluation.harness.run import run_harness

    run_harness(context.args, data)
