"""The ``ultrafuser`` command: plan -> prepare -> train -> export -> generate, and checks on the way.

Bad input ends every command with one line and exit code 2.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ultrafuser_mega.cli import (
    baseline,
    chat,
    clean,
    distil,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    lm_eval,
    look,
    plan,
    prepare,
    report,
    serve,
    slurm,
    synthesize,
    train,
    verify,
)
from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError, system_refusal
from ultrafuser_mega.runtime.quiet import quiet_dependencies

_HELP = """Fuse specialised language models into one, token by token.

Without --config every command works on the embedded default: three toy specialists, made on first use.

\b
  ultrafuser doctor                              is this machine ready?
  ultrafuser verify FOLDER --tp 2                does a sharded specialist compute what transformers computes?
  ultrafuser plan --config my.yaml               is everything there, does it fit, what goes where?
  ultrafuser synthesize --config synth.yaml --out DIR   instruction data, made by models behind endpoints
  ultrafuser clean text=FILES --out DIR          data without copies, refusals, broken code, benchmarks' items
  ultrafuser look DIR                            a page of it: topics, lengths, what was removed, samples
  ultrafuser prepare --config my.yaml            tokenise the data, see what was dropped and why
  ultrafuser train --config my.yaml              both stages, evaluation, checkpoints: runs/<name>/
  ultrafuser slurm --config my.yaml --submit     the same on a cluster: writes a batch script, submits it
  ultrafuser report RUN RUN                      runs beside each other: losses, speed, phases, settings
  ultrafuser import my.yaml CHECKPOINT           the specialists as a checkpoint of step 0
  ultrafuser import RELEASE CHECKPOINT           a fused model as one, to train further
  ultrafuser export CHECKPOINT OUT               the fused model as a Hugging Face folder (--what specialist:NAME)
  ultrafuser baseline average --out DIR          what one would do instead: merged, further tuned, ... models
  ultrafuser distil RUN --into text --out DIR    one model that has learnt from the fused one
  ultrafuser verify OUT CHECKPOINT               do two models give the same logits?
  ultrafuser generate OUT "a prompt"             an answer, coloured by the specialists that gave it
  ultrafuser chat OUT                            a conversation
  ultrafuser serve OUT --port 8000               the same for many, in OpenAI's protocol; a page at /
  ultrafuser evaluate OUT RUN@math --data DIR    benchmarks, models beside each other

Every key of a configuration can be overridden behind the command, as in stage2.steps=1000
layouts.0.dp=2. Its layouts are alternatives: a job takes the first that uses exactly its ranks.
Bad input ends a command with one line that begins "error:" and exit code 2.
"""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=_HELP
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("ultrafuser_mega"))
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None: ...


app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("synthesize")(synthesize.synthesize)
app.command("clean")(clean.clean)
app.command("look")(look.look)
app.command("prepare")(prepare.prepare)
app.command("train")(train.train)
app.command("slurm")(slurm.slurm)
app.command("report")(report.report)
app.command("evaluate")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.CONTEXT)(lm_eval.lm_eval)
app.command("import")(import_.import_)
app.command("export")(export.export_)
app.add_typer(baseline.app, name="baseline")
app.command("distil")(distil.distil)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)


def main() -> None:
    """Entry point of the ``ultrafuser`` command."""
    quiet_dependencies()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers' loading are for people
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        refusal = system_refusal(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
