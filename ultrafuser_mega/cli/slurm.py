"""``ultrafuser slurm``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultrafuser_mega.cli.options import Config, Overrides
from ultrafuser_mega.errors import InputError, writing

if TYPE_CHECKING:
    from ultrafuser_mega.launch.slurm import Container


def slurm(
    overrides: Overrides = None,
    config: Config = None,
    nodes: Annotated[
        str | None, typer.Option(help="N, or LEAST-MOST; default: what the first of layouts takes", show_default=False)
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="each has a GPU, but with device=cpu; default: at most 8", show_default=False, min=1),
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(help="default: 8, with device=cpu 1", min=1, show_default=False)
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="limit, as sbatch takes it; default: the partition's", show_default=False)
    ] = None,
    partition: Annotated[str | None, typer.Option(help="default: the cluster's", show_default=False)] = None,
    grace: Annotated[
        int, typer.Option(help="seconds before the limit at which ranks are told to checkpoint and leave", min=1)
    ] = 300,
    max_restarts: Annotated[
        int, typer.Option(help="how often ranks that failed are started again within the job", min=0)
    ] = 3,
    cache: Annotated[
        str | None,
        typer.Option(help="folder on the nodes' own disks for a copy of the token store", show_default=False),
    ] = None,
    pyxis: Annotated[
        str | None, typer.Option(help="container image, for srun with the Pyxis plugin", show_default=False)
    ] = None,
    apptainer: Annotated[str | None, typer.Option(help="container image, for Apptainer", show_default=False)] = None,
    mounts: Annotated[
        str, typer.Option(help="FROM:TO,... into the container, beside the working directory", show_default=False)
    ] = "",
    python: Annotated[
        str | None, typer.Option(help="of the ranks; default: this one, in a container python3", show_default=False)
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="further option of sbatch, as --sbatch=--account=NAME", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="file to write the script to", show_default=False)
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="hand it to sbatch, after the checks of plan")] = False,
) -> None:
    """Write a batch script for Slurm from the configuration's layouts, or submit it.

    It begins or goes on with the run, whichever is due: each time the job comes back from the queue, and when ranks
    that failed are started again. Preemption and the time limit put it back into the queue behind a checkpoint; the
    log is appended. With a range of nodes it takes what it is given, as far as a layout fits. It is to be submitted
    from the folder that paths of the configuration are relative to, which all nodes must see.
    """
    from ultrafuser_mega.config import load_config

    loaded = load_config(config, overrides or [])
    # Behind the configuration: torch and Megatron take seconds, which a misspelt key need not cost.
    from ultrafuser_mega.launch.rank import ensure_toy
    from ultrafuser_mega.launch.slurm import SlurmJob, batch_script, fitting_nodes
    from ultrafuser_mega.launch.slurm import submit as hand_over
    from ultrafuser_mega.planning.preflight import plan_layouts, preflight

    fitting, each = fitting_nodes(plan_layouts(loaded), nodes, ranks_per_node)
    gpus = loaded.device != "cpu"
    container = _container(pyxis, apptainer, mounts)
    script = batch_script(
        SlurmJob(
            name=loaded.name,
            python=python or ("python3" if container else sys.executable),
            config_path=config,
            overrides=overrides or [],
            nodes=fitting,
            ranks_per_node=each,
            gpus=gpus,
            cpus_per_rank=cpus_per_rank or (8 if gpus else 1),
            time=time,
            partition=partition,
            grace_s=grace,
            max_restarts=max_restarts,
            sbatch=sbatch or [],
            container=container,
            cache=cache,
            written_by=shlex.join(["ultrafuser", *sys.argv[1:]]),
        )
    )
    if output is not None:
        with writing(output):
            output.write_text(script)
    if submit:
        if container is None:  # whose paths are its own
            ensure_toy(loaded, fitting[0] * each)
            preflight(loaded, fitting[0] * each, resume=False)
        print(hand_over(script))
    elif output is None:
        print(script, end="")
    else:
        print(f"wrote {output}; sbatch {shlex.quote(str(output))}")


def _container(pyxis: str | None, apptainer: str | None, mounts: str) -> Container | None:
    from ultrafuser_mega.launch.slurm import Container

    if pyxis and apptainer:
        raise InputError("--pyxis, --apptainer: two ways into a container; give the one that the cluster has")
    if pyxis:
        return Container("pyxis", pyxis, mounts)
    if apptainer:
        return Container("apptainer", apptainer, mounts)
    if mounts:
        raise InputError("--mounts: there is no container; give its image by --pyxis or --apptainer")
    return None
