"""A batch script for Slurm: one task per rank, started by srun itself, so that signals and exit codes are theirs.

What the script does beside starting ranks:

- Preemption and the time limit reach every rank as SIGTERM and SIGUSR1; they finish the step, write a checkpoint and
  exit with EXIT_GO_ON, whereupon the script puts the job back into the queue. So it does where a signal came before
  the ranks listened. A cancelled job stays cancelled: then Slurm ends the script too.
- Ranks that were killed or met a defect are started again at once, within the same allocation. What would only come
  again, bad input and divergence, ends the job.
- srun reports the highest exit code of all ranks. They end by themselves within seconds of the first, whose code is
  thus not hidden behind that of ranks which srun killed; what hangs is killed after ``_UNTIL_KILLED_S``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ultrafuser_mega.errors import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_GO_ON, InputError
from ultrafuser_mega.launch.rank import rank_arguments
from ultrafuser_mega.runtime.layout import LayoutPlan

_UNTIL_KILLED_S = 30  # of ranks that outlive another: more than a survivor waits for the first to say why
_RANKS_PER_NODE = 8
# As sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<numbers>\d+(?::\d+){0,2})")
_NODES = re.compile(r"(?P<least>[1-9]\d*)(?:-(?P<most>[1-9]\d*))?")
# For the shell of the batch script to fill in, as $TMPDIR; nothing else that a shell reads as more than a name.
_NODE_PATH = re.compile(r"[/$][\w./$\-]*")

# Of a rank that stopped because a signal asked it to, or that SIGUSR1 or SIGTERM ended before it listened.
_STOPPED = f"{EXIT_GO_ON} | 138 | 143"
_ENDED = (
    "set -uo pipefail",
    "",
    "# What becomes of the job when its ranks have ended with exit code $1.",
    "ended() {",
    f"    case $1 in {_STOPPED})",
    '        echo "stopped by a signal: back into the queue"',
    '        scontrol requeue "$SLURM_JOB_ID" && sleep 60  # Slurm ends this script meanwhile',
    "        ;;",
    "    esac",
    '    exit "$1"',
    "}",
    "",
)


@dataclass(frozen=True)
class Container:
    """How the ranks get into ``image``: by the Pyxis plugin of srun or by Apptainer; ``mounts`` as "from:to,..."."""

    runtime: Literal["pyxis", "apptainer"]
    image: str
    mounts: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """What a batch script is made of.

    Attributes:
        name: of the job.
        python: the ranks' interpreter.
        config_path: the run's configuration, seen from the folder of submission; None: the embedded one.
        overrides: of the configuration.
        nodes: numbers of nodes that a layout fits, the largest first; the job takes the first that it was given.
        ranks_per_node: tasks of a node.
        gpus: whether every rank has one.
        cpus_per_rank: cores.
        time: limit, as sbatch takes it; None: the partition's.
        partition: None: the cluster's default.
        grace_s: seconds before the time limit at which the ranks are told to stop.
        max_restarts: how often ranks that failed are started again before the job fails.
        sbatch: further options of sbatch.
        container: None: ranks run on the node as it is.
        cache: folder on the nodes' own disks for a copy of the token store; None: none is made.
        written_by: the command that wrote the script.
    """

    name: str
    python: str
    config_path: Path | None
    overrides: Sequence[str]
    nodes: Sequence[int]
    ranks_per_node: int
    gpus: bool
    cpus_per_rank: int
    time: str | None = None
    partition: str | None = None
    grace_s: int = 300
    max_restarts: int = 3
    sbatch: Sequence[str] = ()
    container: Container | None = None
    cache: str | None = None
    written_by: str = "ultrafuser slurm"

    def __post_init__(self) -> None:
        if self.time is not None and 0 < _seconds(self.time) <= self.grace_s:
            raise InputError(
                f"--time: {self.time} is over before the ranks are told to stop, {self.grace_s} s before its end "
                "(--grace); give more time or less grace"
            )
        if self.cache is not None and not _NODE_PATH.fullmatch(self.cache):
            raise InputError(
                f"--cache: {self.cache!r} is no absolute path of letters, digits and ./-_ (with $NAME for what the "
                "batch script's shell fills in); give one, as /tmp/$USER/store"
            )


def fitting_nodes(
    layouts: Sequence[LayoutPlan], nodes: str | None, ranks_per_node: int | None
) -> tuple[list[int], int]:
    """Numbers of nodes that a layout fits, the largest first, and the ranks of each.

    Args:
        layouts: alternatives, what is wanted most first.
        nodes: "N" or "LEAST-MOST"; None: as many as the first layout takes.
        ranks_per_node: None: as the layout has them, at most 8.

    Raises:
        InputError: none fits, or ``nodes`` is no such text.
    """
    first = layouts[0].world_size
    if nodes is None:
        each = ranks_per_node or min(first, _RANKS_PER_NODE)
        if first % each:
            raise InputError(
                f"layouts.0: {first} ranks do not fill nodes of {each}; give --nodes, or --ranks-per-node that divides "
                f"{first}"
            )
        return [first // each], each
    read = _NODES.fullmatch(nodes)
    if read is None:
        raise InputError(f"--nodes: {nodes!r} is no number of nodes; give one, as 4, or a range, as 2-4")
    least, most = int(read["least"]), int(read["most"] or read["least"])
    if most < least:
        raise InputError(f"--nodes: {nodes} ends before it begins; did you mean {most}-{least}?")
    sizes = [layout.world_size for layout in layouts]
    filled = [size // most for size in sizes if size % most == 0 and size // most <= _RANKS_PER_NODE]
    each = ranks_per_node or (filled[0] if filled and least == most else min(first, _RANKS_PER_NODE))
    fitting = [count for count in range(most, least - 1, -1) if count * each in sizes]
    if not fitting:
        counts = sorted({size // each for size in sizes if size % each == 0})
        would = f"--nodes {' or '.join(map(str, counts))}, " if counts else ""
        raise InputError(
            f"--nodes: {nodes} node(s) of {each} rank(s) fit none of the layouts, which use "
            f"{', '.join(map(str, sorted(set(sizes))))} rank(s); use {would}--ranks-per-node, or add a layout"
        )
    return fitting, each


def batch_script(job: SlurmJob) -> str:
    """The script's text, for sbatch."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Written by: {job.written_by}",
        *(f"#SBATCH {option}" for option in _options(job)),
        "",
        *_ENDED,
        "# Ranks meet on the first node, at a port that no other job's ranks on that node have.",
        'read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        f"export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{job.cpus_per_rank}}}",
        "# As many nodes as a layout fits, of those that the job was given.",
        f"for nodes in {' '.join(map(str, job.nodes))}; do",
        '    [ "$nodes" -le "$SLURM_JOB_NUM_NODES" ] && break',
        "done",
        "",
    ]
    rank = [job.python, "-m", "ultrafuser_mega.cli.rank"]
    program = shlex.join([*rank, *rank_arguments(job.config_path, job.overrides, requeue=True)])
    inside, cores = _into_container(job), job.ranks_per_node * job.cpus_per_rank
    if job.cache is not None:
        prepare = shlex.join([job.python, "-m", "ultrafuser_mega", "prepare"])
        settings = shlex.join(rank_arguments(job.config_path, job.overrides))
        lines += [
            "# The token store is made once; every node reads a copy on its own disk, which is compared with it.",
            f'store="{job.cache}"',
            f"srun --nodes=1 --ntasks=1 --cpus-per-task={cores} {inside}{prepare} {settings} || ended $?",
            'srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \\',
            f'    {inside}{prepare} --copy-to "$store" {settings} || ended $?',
            "",
        ]
        program += ' data.store="$store"'
    each = job.ranks_per_node
    lines += [
        f"for restart in {{0..{job.max_restarts}}}; do",
        '    [ "$restart" -eq 0 ] || echo "restart $restart: going on from the newest checkpoint"',
        "    code=0",
        f'    srun --nodes="$nodes" --ntasks=$((nodes * {each})) --ntasks-per-node={each} \\',
        f"        --cpus-per-task={job.cpus_per_rank} --kill-on-bad-exit=0 --wait={_UNTIL_KILLED_S} {inside}bash -c '",
        "            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS",
        f'            export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={each}; exec "$@"\' rank \\',
        f"        {program} || code=$?",
        f"    case $code in 0 | {EXIT_BAD_INPUT} | {EXIT_DIVERGED} | {_STOPPED}) break ;; esac",
        "done",
        'ended "$code"',
    ]
    return "\n".join([*lines, ""])


def submit(script: str) -> str:
    """Hand ``script`` to sbatch; what that says.

    Raises:
        InputError: there is no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise InputError("--submit: there is no sbatch on this machine; write the script and submit it where Slurm is")
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error:", "").split())
        raise InputError(f"sbatch: {said or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def _options(job: SlurmJob) -> list[str]:
    least, most = job.nodes[-1], job.nodes[0]
    options = [
        f"--job-name={job.name}",
        f"--nodes={most if least == most else f'{least}-{most}'}",
        # A node's cores as one task's: of a requeued job Slurm asks for as many tasks as it had, on fewer nodes too.
        f"--cpus-per-task={job.ranks_per_node * job.cpus_per_rank}",
        *([f"--gpus-per-node={job.ranks_per_node}"] if job.gpus else []),
        *([f"--time={job.time}"] if job.time else []),
        *([f"--partition={job.partition}"] if job.partition else []),
        "--output=slurm-%x-%j.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{job.grace_s}",
        *job.sbatch,
    ]
    for option in options:
        if "\n" in option or not option.startswith("-"):
            raise InputError(f"--sbatch: {option!r} is no option of sbatch; give one, as --sbatch=--account=NAME")
    return options


def _into_container(job: SlurmJob) -> str:
    """What stands behind srun's other options to have the program run in the container and the working directory."""
    if job.container is None:
        return ""
    image, mounts = shlex.quote(job.container.image), job.container.mounts
    mounts = '"$PWD:$PWD"' + (f",{shlex.quote(mounts)}" if mounts else "")
    if job.container.runtime == "pyxis":
        return f'--container-image={image} --container-mounts={mounts} --container-workdir="$PWD" '
    return f'apptainer exec {"--nv " if job.gpus else ""}--bind={mounts} --pwd="$PWD" {image} '


def _seconds(text: str) -> int:
    """Of a time limit; 0 for none at all."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return 0
    read = _TIME.fullmatch(text)
    if read is None:
        raise InputError(
            f"--time: {text!r} is no time limit; give minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    numbers = [int(number) for number in read["numbers"].split(":")]
    if read["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(read["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds
