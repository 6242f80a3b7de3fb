"""``ultrafuser plan``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ultrafuser_mega.cli.options import Config, Overrides, Ranks, wide_console
from ultrafuser_mega.errors import InputError

if TYPE_CHECKING:
    from ultrafuser_mega.config import FuserConfig
    from ultrafuser_mega.planning.preflight import RunPlan

_LONG = 10**10  # bytes: more take a while to read, which is then said


def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Ranks = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="also check the run's newest checkpoint; what would be other than before")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="run the training step itself instead, on tensors that hold nothing")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="rank the layouts of so many GPUs instead", min=1, show_default=False)
    ] = None,
    gpu: Annotated[str, typer.Option(help="which, with --gpus: a100-40g, a100-80g, h100-80g, h200-141g, b200-180g")] = (
        "h100-80g"
    ),
    gpus_per_node: Annotated[int, typer.Option(help="with --gpus: tp stays within a node", min=1)] = 8,
) -> None:
    """Check everything without training, show what ranks hold.

    Folders, tensors, tokenizers, sizes, batches and data files are checked as a training job checks them. The table
    gives every rank's specialist and pipeline stage, its rows of the vocabulary, and its memory by kind.

    With --gpus it ranks every sensible layout of so many GPUs by the step time that it predicts, says which fit and
    what would make others, and prints the entry for layouts. That takes the specialists' config.json alone: no
    weights, no data.

    A checkpoint that the job would begin with (--resume, or checkpoint.start) is read whole, to compare its files with
    the sizes and checksums that were noted when it was written, as the job does: that takes as long as reading it. The
    folders of weights that it leaves out are compared with samples of what was in them.

    --dry-run runs evaluation, a step of each stage and what a checkpoint gathers, on one rank of each kind, with real
    code and tensors that hold nothing: no GPU, no memory and no weights needed, config.json files are enough. It shows
    what ranks hold at their largest, the work of a microbatch and what travels, beside what the formula says. With
    device=cuda it takes the way of a GPU (a C++ compiler is needed) and names every place where the host waits for the
    device; else the CPU's.

    A configuration's layouts are alternatives: a job takes the first that uses exactly its ranks.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    if gpus is not None:
        if ranks is not None or resume or dry_run:
            raise InputError("--gpus: tries layouts of its own; leave --ranks, --resume and --dry-run out")
        _rank_layouts(loaded, gpus, gpu, gpus_per_node)
        return
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.data.store import MANIFEST, TokenStore
    from ultrafuser_mega.launch.rank import ensure_toy
    from ultrafuser_mega.planning.hardware import GPUS_PER_NODE
    from ultrafuser_mega.planning.host_memory import host_memory
    from ultrafuser_mega.planning.memory import rank_shares
    from ultrafuser_mega.planning.microbatch import workload_of
    from ultrafuser_mega.planning.preflight import (
        chosen_layout,
        compared_with_data,
        first_layouts_ranks,
        laid_out,
        preflight,
    )
    from ultrafuser_mega.planning.trained import part_shares
    from ultrafuser_mega.reporting.parts_table import parts_table
    from ultrafuser_mega.reporting.plan_table import plan_table
    from ultrafuser_mega.training.prepare import ended_by_epochs, prepare
    from ultrafuser_mega.training.run_folder import left_by_a_run

    ranks = ranks or first_layouts_ranks(loaded)
    ensure_toy(loaded, ranks)
    if dry_run:
        if resume:
            raise InputError("--dry-run: reads no checkpoint; leave --resume out")
        _dry_run(laid_out(loaded, ranks), config, overrides or [])
        return
    resolved, compared = _compared(preflight(loaded, ranks, resume))
    store = None
    if (loaded.store_dir / MANIFEST).is_file():
        prepare(loaded, resolved.vocab_size, compare_only=True)
        store = TokenStore.open(loaded.store_dir, verify=False)
        resolved = ended_by_epochs(compared_with_data(resolved, store), store)
    console = wide_console()
    shares = rank_shares(resolved, device="cpu" if loaded.device == "cpu" else "cuda")
    console.print(plan_table(resolved.layout.describe(), shares))
    for number in loaded.stages:
        console.print(parts_table(f"stage {number} trains", part_shares(resolved, number)))
    lines = [chosen_layout(resolved)]
    if loaded.stages:
        number, stage = max(loaded.stages.items())
        lines.append(f"stage {number}: {workload_of(loaded, stage.samples_per_class).source}")
    if loaded.device != "cpu" and (on_host := host_memory(resolved)) is not None:
        lines.append(on_host.in_words(min(GPUS_PER_NODE, resolved.layout.world_size)))
    for number, stage in resolved.config.stages.items():
        if stage.epochs is not None:
            counted = f"{stage.steps:,} steps" if store is not None else "as many steps as the data make, once prepared"
            lines.append(f"stage {number}: {stage.epochs:g} epochs: {counted}")
    if resolved.resume is not None:
        lines += [f"--resume: goes on from {resolved.resume[1]}", *(resolved.changes or ["as the run was before"])]
    elif left_by_a_run(loaded.run_dir):
        lines.append(f"note: {loaded.run_dir} holds an earlier run, which a new one keeps beside it under a number")
    lines += [*resolved.notices, *compared]
    lines.append("checked: folders, tensors, tokenizers, layout, batch sizes, data files exist (their rows: prepare)")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _dry_run(plan: RunPlan, config: Path | None, overrides: list[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from ultrafuser_mega.dry_run.formula import predictions
    from ultrafuser_mega.dry_run.processes import rehearse_ranks
    from ultrafuser_mega.dry_run.rehearse import rank_classes
    from ultrafuser_mega.reporting.rehearsal import rehearsal_table, waits_of

    classes = rank_classes(plan)
    device: Literal["cpu", "cuda"] = "cuda" if plan.config.device == "cuda" else "cpu"
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"dry run of {len(classes)} kind(s) of ranks", total=len(classes))
        found = rehearse_ranks(
            list(classes), plan.layout.world_size, device, config, overrides, lambda: bar.advance(task)
        )
    title = f"{plan.layout.describe()}: dry run on fake {device} tensors, one rank of each kind"
    predicted = {key: value for one in found for key, value in predictions(plan, one, device).items()}
    console = wide_console()
    console.print(rehearsal_table(title, list(zip(classes.values(), found, strict=True)), predicted))
    for line in waits_of(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rank_layouts(config: FuserConfig, gpus: int, gpu: str, gpus_per_node: int) -> None:
    from ultrafuser_mega.planning.advice import advise
    from ultrafuser_mega.planning.hardware import Cluster, named_gpu
    from ultrafuser_mega.planning.preflight import outline
    from ultrafuser_mega.reporting.layout_table import layout_table

    advice = advise(outline(config), Cluster(named_gpu(gpu), gpus_per_node), gpus)
    console = wide_console(120)
    console.print(layout_table(f"{gpus} x {gpu}, {gpus_per_node} to a node", advice.rows, advice.more))
    for line in advice.lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _compared(plan: RunPlan) -> tuple[RunPlan, list[str]]:
    """``plan``, from a checkpoint whose files were compared, and that in words."""
    from ultrafuser_mega.checkpoint.checkpoint import DamagedCheckpointError
    from ultrafuser_mega.planning.preflight import gone_back

    damages: list[DamagedCheckpointError] = []
    while weights := plan.resume or plan.start:
        try:
            compared = _compare_files(weights[1])
            return plan, [*compared, *_compare_left_out(plan, weights[1])]
        except DamagedCheckpointError as damage:
            damages.append(damage)
            plan = gone_back(plan, damages)
    return plan, []


def _compare_left_out(plan: RunPlan, checkpoint: Path) -> list[str]:
    """Compare the folders of what a small checkpoint leaves out with what was noted of them, where they are now.

    Raises:
        InputError: one is not there, or holds other weights.
    """
    from ultrafuser_mega.checkpoint.left_out import weights_beside

    folders = plan.config.folders if plan.resume is not None else None
    found = weights_beside(checkpoint, plan.architectures, folders)
    return (
        [f"checked: weights that it leaves out are as they were in {', '.join(map(str, found.values()))}"]
        if found
        else []
    )


def _compare_files(checkpoint: Path) -> list[str]:
    """Compare a checkpoint's files with what was noted of them, a bar on standard error meanwhile; the result in words.

    Raises:
        InputError: a file is missing or damaged.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ultrafuser_mega.checkpoint.checkpoint import noted_bytes, verify_checkpoint_here

    total = noted_bytes(checkpoint)
    if not total:
        return [f"note: {checkpoint} notes no checksums, as the first versions wrote it; its files are not compared"]
    shown = sys.stderr.isatty()
    if total > _LONG and not shown:
        print(f"comparing checksums of {total / 1e9:.0f} GB in {checkpoint}", file=sys.stderr, flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task("comparing checksums", total=total)
        verify_checkpoint_here(checkpoint, lambda size: bar.advance(task, size))
    return [f"checked: every file of {checkpoint} has the size and the checksum that it was written with"]
