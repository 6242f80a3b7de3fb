"""The ``ultrafuser`` command: plan -> prepare -> train -> export -> generate, and checks on the way.

Bad input ends every command with one line and exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultrafuser_mega.cli import generate as commands
from ultrafuser_mega.convert import SAMPLE_TEXT
from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError

_HELP = """Fuse specialised language models into one, token by token.

Without --config every command works on the embedded default: three toy specialists, made on first use.

\b
  ultrafuser doctor                              is this machine ready?
  ultrafuser verify FOLDER --tp 2                does a sharded specialist compute what transformers computes?
  ultrafuser plan --config my.yaml --ranks 8     is everything there, does it fit, what goes where?
  ultrafuser prepare --config my.yaml            tokenise the data, see what was dropped and why
  ultrafuser train --config my.yaml --ranks 8    both stages, evaluation, checkpoints: runs/<name>/
  ultrafuser import my.yaml CHECKPOINT           the specialists as a checkpoint of step 0
  ultrafuser export CHECKPOINT OUT               the fused model as a Hugging Face folder (--what specialist:NAME)
  ultrafuser verify OUT CHECKPOINT               do two models give the same logits?
  ultrafuser generate OUT "a prompt"             an answer, coloured by the specialists that gave it
  ultrafuser chat OUT                            a conversation

Every key of a configuration can be overridden behind the command, as in stage2.steps=1000
layouts.0.dp=2. Bad input ends a command with one line that begins "error:" and exit code 2.
"""

# Not ours to mend, nor worth a traceback: full, read-only or forbidden places.
_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE}

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=_HELP
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file; default: the embedded toy run", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key.sub=value]...", help="override configuration values", show_default=False),
]


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


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough for every table."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


@app.command()
def doctor() -> None:
    """Versions, device, accelerators; what is missing for what.

    Exit code 1 when something that every run needs is missing.
    """
    from ultrafuser_mega.cli.doctor import report

    healthy = report(Console())
    raise typer.Exit(0 if healthy else 1)


@app.command()
def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(help="ranks the job will be launched with")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="also check the run's newest checkpoint")] = False,
) -> None:
    """Check everything without training, show what ranks hold.

    Folders, tensors, tokenizers, sizes, batches and data files are checked as a training job checks them. The table
    gives every rank's specialist and pipeline stage, its rows of the vocabulary, and the memory that weights,
    gradients and optimizer take in either stage.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.launch.local import ensure_toy
    from ultrafuser_mega.planning.plan_table import plan_table
    from ultrafuser_mega.planning.preflight import preflight

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    resolved = preflight(loaded, ranks, resume)
    console = _console()
    console.print(plan_table(resolved))
    console.print("checked: folders, tensors, tokenizers, layout, batch sizes, data files exist (their rows: prepare)")


@app.command()
def prepare(
    overrides: Overrides = None,
    config: Config = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="rebuild a store made from other inputs")] = False,
) -> None:
    """Tokenise the data; tell what was dropped and why.

    The memory-mapped store goes where data.store says, by default into the run's folder. A training job does this by
    itself where it was not done before, and uses a store that was made from the same inputs.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.planning.preflight import shared_vocabulary
    from ultrafuser_mega.toy import make_toy
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    loaded = load_config(config, overrides or [])
    if loaded.toy is not None:
        make_toy(loaded.toy, progress=True)
    report = prepare_data(loaded, shared_vocabulary(loaded), overwrite=overwrite)
    console = _console()
    console.print(report.table())
    for line in report.problems():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(help="processes to start on this machine")] = 8,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")] = False,
) -> None:
    """Check everything, tokenise, then train on this machine.

    Stage 1 trains the gate, stage 2 everything. runs/<name> receives config.yaml, metrics.jsonl, TensorBoard events,
    checkpoints, plots and, at the end, summary.json and the tables in results.md.

    On several machines: torchrun or SLURM with examples/pretrain_fuser.py, see examples/slurm.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.launch.local import ensure_toy, launch_local
    from ultrafuser_mega.planning.preflight import preflight
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    prepare_data(loaded, preflight(loaded, ranks, resume).vocab_size)
    launch_local(ranks, config, overrides or [], resume)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="CONFIG|HF_DIR", help="a run's YAML file, or one model folder")],
    checkpoint: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: the smallest that holds all of theirs")
    ] = None,
) -> None:
    """Make a checkpoint of step 0 from Hugging Face folders.

    With a configuration all of its specialists and a fresh gate go in, with a folder that one under the name
    "specialist". Needs memory for all weights at once.
    """
    from ultrafuser_mega.config import load_config
    from ultrafuser_mega.convert.dtypes import parse_dtype
    from ultrafuser_mega.convert.importer import SINGLE, import_specialists, plan_config, plan_folders

    wanted = parse_dtype(dtype)
    if source.is_dir():
        resolved = plan_folders({SINGLE: source}, wanted)
    else:
        resolved = plan_config(load_config(source, []), wanted)
    import_specialists(resolved, checkpoint)
    for notice in resolved.notices:
        print(notice)
    print(f"wrote {checkpoint}: {', '.join(resolved.architectures)} in {str(resolved.dtype).removeprefix('torch.')}")


@app.command("export")
def export_(
    checkpoint: Annotated[Path, typer.Argument(help="folder that train or import wrote")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    what: Annotated[str, typer.Option(help="fused, or specialist:NAME")] = "fused",
    resume: Annotated[bool, typer.Option("--resume", help="go on from an interrupted export")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not compare with the checkpoint")] = False,
) -> None:
    """Write a checkpoint's fused model, or one of its specialists, as a Hugging Face folder.

    Reads and writes tensor by tensor, whatever layout wrote the checkpoint, in memory for one tensor; export.json
    keeps the SHA-256 of every tensor. Then the folder's logits on a short text are compared with the checkpoint's
    (see verify), which needs memory for the whole exported model in float32: --no-verify leaves that out. The folder
    gets its name when it is complete and equal; exit code 1, and a hidden name, where it computes something else.
    """
    from ultrafuser_mega.convert.compare import DifferentModel
    from ultrafuser_mega.convert.export import export

    try:
        notices = export(checkpoint, out, what, resume=resume, verify=not no_verify)
    except DifferentModel as difference:
        print(f"error: {difference}", file=sys.stderr)
        raise typer.Exit(1) from None
    for notice in notices:
        print(notice)
    print(f"wrote {out}")


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Hugging Face folder; with B also a checkpoint or release")],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="compare A with this instead of with itself", show_default=False)
    ] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel size, without B", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="pipeline-parallel size, without B", min=1)] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="also shard the sequence")] = False,
    text: Annotated[str, typer.Option(help="real text to compare on")] = SAMPLE_TEXT,
    tolerance: Annotated[float, typer.Option(help="largest accepted difference of a float32 logit")] = 1e-4,
) -> None:
    """Compare a sharded specialist with transformers, or two models with each other.

    With A alone: runs it on tp x pp processes of this machine, on random and on real tokens, and prints the largest
    absolute difference of a float32 logit. With A and B: any two of Hugging Face folder, CHECKPOINT@specialist:NAME,
    CHECKPOINT@fused, RELEASE@specialist:NAME, RELEASE@fused; prints JSON. Needs memory for a whole
    model in float32. Exit code 1 when a difference is above the tolerance.
    """
    if b is not None:
        from ultrafuser_mega.convert.compare import compare

        if (tp, pp, sequence_parallel) != (1, 1, False):
            raise InputError("--tp, --pp, --sequence-parallel: shard A compared with itself; leave them out with B")
        comparison = compare(a, b, text, tolerance)
        print(comparison.to_json())
        raise typer.Exit(0 if comparison.equal else 1)

    from ultrafuser_mega.convert.verify import verification_batches, verify_specialist

    folder = Path(a)
    batches = verification_batches(folder, text, multiple=tp)
    differences = verify_specialist(folder, tp, pp, batches, sequence_parallel=sequence_parallel)
    for difference in differences:
        print(
            f"{difference.what} tokens {tuple(batches[difference.what].shape)}: "
            f"max abs logit difference {difference.max_abs:.3g}, same top token at {difference.top1:.2%} of positions"
        )
    worst = max(difference.max_abs for difference in differences)
    print(f"{'equal' if worst <= tolerance else 'DIFFERENT'} within {tolerance:g} at tp={tp} pp={pp}")
    raise typer.Exit(0 if worst <= tolerance else 1)


app.command()(commands.generate)
app.command()(commands.chat)


def main() -> None:
    """Entry point of the ``ultrafuser`` command."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of transformers' loading are for people
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
