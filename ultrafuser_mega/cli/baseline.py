"""``ultrafuser baseline``: models that fusing is compared with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrafuser_mega.cli.options import Config, MaxRestarts, Overrides, Ranks, Requeue, Resume
from ultrafuser_mega.errors import InputError

if TYPE_CHECKING:
    from ultrafuser_mega.baselines.derived import DerivedRun

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_Out = Annotated[Path, typer.Option(help="folder to write; must not exist")]
_Of = Annotated[
    str | None,
    typer.Option(
        help="specialists, the one whose structure, tokenizer and template the result has first: text,math or "
        "text=2,math=1 with weights; default: all of them, alike",
        show_default=False,
    ),
]
_Base = Annotated[Path, typer.Option(help="Hugging Face folder of the model that the specialists were trained from")]
_Scale = Annotated[float, typer.Option(help="of the sum of what they learned")]
_Density = Annotated[
    float | None, typer.Option(help="share of it that is kept; default: as published", show_default=False)
]
_Mergekit = Annotated[
    Path | None,
    typer.Option(help="python of an environment that has mergekit; default: this one", show_default=False),
]
_ResumeState = Annotated[bool, typer.Option("--resume", help="go on from the run's newest state")]
_NoLosses = Annotated[
    bool, typer.Option("--no-losses", help="do not evaluate on the held-out data, which loads the whole model")
]


@app.callback()
def baseline() -> None:
    """Write a model to compare the fused one with, made of the same specialists and data.

    \b
      average            the specialists' weights averaged
      task-arithmetic    what each learned beyond a base model, added to it
      ties, dare         the same, trimmed or thinned before (by mergekit)
      further-tuned      one specialist, trained alone on the same data
      llamafuser         the fused structure over copies of a model that was not specialised
      btx                the specialists' feed-forward parts as a mixture of experts, trained
      fusechat           one specialist that learns from the others, merged
      clusters           who answers which prompts: a rule for a run's specialists, no model

    All but the last write a Hugging Face folder: tokenizer, chat template, a card, baseline.json (what was done),
    config.yaml (the configuration) and summary.json (held-out losses). evaluate and generate take it as they take a
    run, `ultrafuser verify` and the configuration of another run as they take a specialist.
    """


@app.command()
def clusters(
    run: Annotated[Path, typer.Argument(help="of ultrafuser train: its specialists and its data", show_default=False)],
    out: Annotated[Path, typer.Option(help="file to write, FILE.routing; must not exist")],
    clusters: Annotated[int, typer.Option(min=1, help="how many")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="training samples of each class that are looked at")] = 200,
    seed: Annotated[int, typer.Option(help="of the samples and of k-means")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or one per specialist")] = "auto",
) -> None:
    """Find which specialist answers which prompts.

    Routing without training (Avengers, Zhang et al. 2025): prompts of the training data are clustered, and in every
    cluster the specialist answers whose likelihood of the known responses is highest.

    \b
      ultrafuser baseline clusters runs/demo --out demo.routing
      ultrafuser evaluate runs/demo runs/demo+demo.routing --suite toy --data toy/data
    """
    from ultrafuser_mega.baselines.routing import write_routing

    write_routing(run, out, clusters, samples, seed, device)
    print(f"wrote {out}: {run}+{out} is routed by it")


@app.command()
def average(
    out: _Out,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    no_losses: _NoLosses = False,
) -> None:
    """Average the specialists' weights.

    As Wortsman et al. (2022) do. Tensor by tensor, in float64, rounded once; memory for one tensor, and for the
    whole model to evaluate it. Specialists must have equal shapes, and to mean anything one base model: weights of
    independent trainings do not lie where an average of them is a model. Vocabulary rows are cropped to those that
    all have.

    \b
      ultrafuser baseline average --config my.yaml --out merged
      ultrafuser baseline average --config my.yaml --out merged2 --of text=0.7,math=0.3
    """
    _merge("average", out, overrides, config, of, no_losses)


@app.command("task-arithmetic")
def task_arithmetic(
    out: _Out,
    base: _Base,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    scale: _Scale = 1.0,
    no_losses: _NoLosses = False,
) -> None:
    """Add what each specialist learned to the base.

    Task arithmetic (Ilharco et al. 2023): base + scale * sum of weight * (specialist - base); otherwise as
    `average`. Weights are not divided by their sum.

    \b
      ultrafuser baseline task-arithmetic --config my.yaml --base Llama-2-13b-hf --out merged
      ultrafuser baseline task-arithmetic --config my.yaml --base Llama-2-13b-hf --out merged --scale 0.4
    """
    _merge("task-arithmetic", out, overrides, config, of, no_losses, base=base, scale=scale)


@app.command()
def ties(
    out: _Out,
    base: _Base,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    scale: _Scale = 1.0,
    density: _Density = None,
    mergekit: _Mergekit = None,
    no_losses: _NoLosses = False,
) -> None:
    """Task arithmetic over the largest changes.

    Those whose signs agree (TIES, Yadav et al. 2023), computed by mergekit. --density of each specialist's change
    is kept, the largest (0.2). mergekit is no part of this program's environment:

    \b
      python -m venv mk && mk/bin/pip install mergekit==0.1.5
      ultrafuser baseline ties --config my.yaml --base Llama-2-13b-hf --out merged --mergekit mk/bin/python
    """
    more = {"base": base, "scale": scale, "density": density, "mergekit": mergekit}
    _merge("ties", out, overrides, config, of, no_losses, **more)


@app.command()
def dare(
    out: _Out,
    base: _Base,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    scale: _Scale = 1.0,
    density: _Density = None,
    mergekit: _Mergekit = None,
    no_losses: _NoLosses = False,
) -> None:
    """Task arithmetic over a part of the changes.

    A random one, scaled up (DARE, Yu et al. 2024), computed by mergekit. --density of each specialist's change is
    kept (0.1: a drop rate of 0.9) and divided by it; drawn by the configuration's seed. For changes as small as
    fine-tuning's; larger ones need a higher density. mergekit as in `ties`.
    """
    more = {"base": base, "scale": scale, "density": density, "mergekit": mergekit}
    _merge("dare", out, overrides, config, of, no_losses, **more)


def _merge(
    method: str,
    out: Path,
    overrides: list[str] | None,
    config: Path | None,
    of: str | None,
    no_losses: bool,
    **how: object,
) -> None:
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.baselines.merge import Merge, merge, parse_parts

    chosen = Merge(method, parse_parts(loaded, of), **how)  # type: ignore[arg-type]
    for notice in merge(loaded, out, chosen, losses=not no_losses):
        print(notice)
    print(f"wrote {out}")


@app.command("further-tuned")
def further_tuned(
    out: _Out,
    specialist: Annotated[str, typer.Option(help="which one to train")],
    overrides: Overrides = None,
    config: Config = None,
    classes: Annotated[
        str | None, typer.Option(help="of the data, as in math or text,math; default: all", show_default=False)
    ] = None,
    ranks: Ranks = None,
    resume: Resume = False,
    requeue: Requeue = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Train one specialist alone, then export it.

    The same classes, sampler, batches and optimizer, stage 2's rates, and as many samples as both stages of the fused
    model take; with --classes as many samples of fewer classes. A run like any other, named
    <name>-further-tuned-<specialist>, on the ranks that the specialist has in the first of the configuration's layouts;
    its configuration is kept beside it as <run>.yaml, which `ultrafuser slurm` takes where this machine is too small.

    \b
      ultrafuser baseline further-tuned --config my.yaml --specialist text --out text-tuned
      ultrafuser baseline further-tuned --config my.yaml --specialist math --classes math --out math-on-math
      ultrafuser baseline further-tuned --config my.yaml --specialist text --out text-tuned stage2.lr=1e-5
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    from ultrafuser_mega.baselines.derived import further_tuned as derive

    chosen = [name.strip() for name in classes.split(",")] if classes else []
    train_and_export(derive(loaded, specialist, chosen), out, ranks, resume, requeue, max_restarts)


@app.command()
def llamafuser(
    out: _Out,
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the model that stands in for every specialist")],
    overrides: Overrides = None,
    config: Config = None,
    ranks: Ranks = None,
    resume: Resume = False,
    requeue: Requeue = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    """Train the fused structure over one base model.

    Copies of a model that was not specialised stand in for the specialists; the result is exported. Every
    specialist's place, name and template stay, and all of the training. Copies under one template would read the
    same and stay the same: give each its own, as in specialists.code.template=codellama. A base that brings no chat
    template needs one of those as well.

    \b
      ultrafuser baseline llamafuser --config my.yaml --base Llama-2-13b-hf --out llamafuser
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    from ultrafuser_mega.baselines.derived import llamafuser as derive

    train_and_export(derive(loaded, base), out, ranks, resume, requeue, max_restarts)


@app.command()
def btx(
    out: _Out,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    resume: _ResumeState = False,
) -> None:
    """Make the specialists a mixture of experts.

    Branch-Train-MiX (Sukhbaatar et al. 2024): a router sends every token to 2 of the specialists' feed-forward
    parts in each layer, everything else is averaged; trained with the published loss that balances experts.
    Specialists have equal shapes (Llama or Mistral); the result is a MixtralForCausalLM. Trained on the fused
    model's data, sampler and batches at stage 2's rates, for as many samples as both of its stages take, in one
    process (on the GPU if there is one; weights, gradients and AdamW's state in float32). The run is <name>-btx; a
    signal ends it behind a saved state, and --resume goes on.

    \b
      ultrafuser baseline btx --config my.yaml --out btx
      ultrafuser baseline btx --config my.yaml --out btx stage2.lr=5e-5 checkpoint.every=100
    """
    _tune("btx", out, overrides, config, of, resume)


@app.command()
def fusechat(
    out: _Out,
    overrides: Overrides = None,
    config: Config = None,
    of: _Of = None,
    resume: _ResumeState = False,
) -> None:
    """Let one specialist learn from the others.

    FuseChat (Wan et al. 2024): for every other specialist a copy of the first one of --of, the pivot, learns the
    fused model's data and, with a tenth of the weight, the better of both models' predictions of each response; the
    copies are then merged by the size of their changes (VaRM). Only tokenizers must agree, not shapes. Trained as
    `btx` is, once per pair: runs <name>-fusechat-<pivot>-<other>, each with three models in memory.

    \b
      ultrafuser baseline fusechat --config my.yaml --out fusechat
      ultrafuser baseline fusechat --config my.yaml --out fusechat --of math,text,code
    """
    _tune("fusechat", out, overrides, config, of, resume)


def _tune(
    method: str, out: Path, overrides: list[str] | None, config: Path | None, of: str | None, resume: bool
) -> None:
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    from ultrafuser_mega.baselines.btx import btx
    from ultrafuser_mega.baselines.fusechat import fusechat
    from ultrafuser_mega.baselines.merge import parse_parts

    parts = parse_parts(loaded, of)
    if set(parts.values()) != {1.0}:
        raise InputError(f"--of {of}: {method} takes names alone, no weights")
    train = {"btx": btx, "fusechat": fusechat}[method]
    if stop := train(loaded, out, list(parts), resume=resume):
        raise typer.Exit(stop.code)
    print(f"wrote {out}")


def train_and_export(
    run: DerivedRun, out: Path, ranks: int | None, resume: bool, requeue: bool, max_restarts: int
) -> None:
    """Train ``run`` on this machine and write ``out``; a run that does not get to its end ends the command."""
    from ultrafuser_mega.checkpoint.unfinished import refuse_out
    from ultrafuser_mega.convert.compare import DifferentModel
    from ultrafuser_mega.launch.job import train_here
    from ultrafuser_mega.training.run_folder import refuse_running

    refuse_out(out)
    if not run.config.stages:
        raise InputError("stage2.steps: 0 trains nothing that could be exported; give the run 1 or more")
    refuse_running(run.config.run_dir)  # whose ranks may read its configuration again
    run.write_config()
    code = train_here(
        run.config, run.config_path, ranks=ranks, resume=resume, requeue=requeue, max_restarts=max_restarts
    )
    if code or not run.is_over:  # with code 0: its time was up, and --resume goes on
        raise typer.Exit(code)
    try:
        notices = run.export(out)
    except DifferentModel as difference:
        print(f"error: {difference}", file=sys.stderr)
        raise typer.Exit(1) from None
    for notice in notices:
        print(notice)
    print(f"wrote {out}")
