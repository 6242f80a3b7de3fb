"""The ``ultrafuser`` command: plan -> prepare -> train, and checks on the way.

Bad input ends every command with one line and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultrafuser_mega.errors import EXIT_BAD_INPUT, InputError

_HELP = """Fuse specialised language models into one, token by token.

Without --config every command works on the embedded default: three toy specialists, made on first use.

\b
  ultrafuser doctor                              is this machine ready?
  ultrafuser verify FOLDER --tp 2                does a sharded specialist compute what transformers computes?
  ultrafuser plan --config my.yaml --ranks 8     is everything there, does it fit, what goes where?
  ultrafuser prepare --config my.yaml            tokenise the data, see what was dropped and why
  ultrafuser train --config my.yaml --ranks 8    both stages, evaluation, checkpoints: runs/<name>/

Every key of a configuration can be overridden behind the command, as in stage2.steps=1000
layouts.0.dp=2. Bad input ends a command with one line that begins "error:" and exit code 2.
"""

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


@app.command()
def doctor() -> None:
    """Versions, device, accelerators; what is missing for what.

    Exit code 1 when something that every run needs is missing.
    """
    from ultrafuser_mega.doctor import report

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
    from ultrafuser_mega.training.launch import ensure_toy
    from ultrafuser_mega.training.plan_table import plan_table
    from ultrafuser_mega.training.preflight import preflight

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    resolved = preflight(loaded, ranks, resume)
    Console().print(plan_table(resolved))


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
    from ultrafuser_mega.toy import make_toy
    from ultrafuser_mega.training.preflight import shared_vocabulary
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    loaded = load_config(config, overrides or [])
    if loaded.toy is not None:
        make_toy(loaded.toy, progress=True)
    report = prepare_data(loaded, shared_vocabulary(loaded), overwrite=overwrite)
    console = Console()
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
    from ultrafuser_mega.training.launch import ensure_toy, launch_local
    from ultrafuser_mega.training.preflight import preflight
    from ultrafuser_mega.training.prepare import prepare as prepare_data

    loaded = load_config(config, overrides or [])
    ensure_toy(loaded, ranks)
    prepare_data(loaded, preflight(loaded, ranks, resume).vocab_size)
    raise typer.Exit(launch_local(ranks, config, overrides or [], resume))


@app.command()
def verify(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder of a specialist")],
    tp: Annotated[int, typer.Option(help="tensor-parallel size", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="pipeline-parallel size", min=1)] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="also shard the sequence")] = False,
    text: Annotated[str, typer.Option(help="real text to compare on")] = (
        "The quick brown fox jumps over the lazy dog. def add(a, b): return a + b. 12 * 7 = 84."
    ),
    tolerance: Annotated[float, typer.Option(help="largest accepted difference of a float32 logit")] = 1e-4,
) -> None:
    """Compare a sharded specialist with transformers.

    Runs it on tp x pp processes of this machine, on random and on real tokens, and prints the largest absolute
    difference of a float32 logit. Exit code 1 when that is above the tolerance.
    """
    from ultrafuser_mega.convert.verify import verification_batches, verify_specialist

    batches = verification_batches(hf_dir, text, multiple=tp)
    differences = verify_specialist(hf_dir, tp, pp, batches, sequence_parallel=sequence_parallel)
    for difference in differences:
        print(
            f"{difference.what} tokens {tuple(batches[difference.what].shape)}: "
            f"max abs logit difference {difference.max_abs:.3g}, same top token at {difference.top1:.2%} of positions"
        )
    worst = max(difference.max_abs for difference in differences)
    print(f"{'equal' if worst <= tolerance else 'DIFFERENT'} within {tolerance:g} at tp={tp} pp={pp}")
    raise typer.Exit(0 if worst <= tolerance else 1)


def main() -> None:
    """Entry point of the ``ultrafuser`` command."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
