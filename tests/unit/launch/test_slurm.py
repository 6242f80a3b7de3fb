"""The batch script for Slurm: nodes and ranks of a layout, what is refused, and what bash makes of the script."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.command import ultrafuser

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.launch.slurm import Container, SlurmJob, batch_script, fitting_nodes
from ultrafuser_mega.runtime.layout import plan_colocated

PROJECT = Path(__file__).parents[3]
EXAMPLE = PROJECT / "examples" / "slurm" / "pretrain_fuser.sbatch"


def script(**changes: Any) -> str:
    job: dict[str, Any] = {
        "name": "run",
        "python": "python3",
        "config_path": Path("my run.yaml"),
        "overrides": ["a.b=it's"],
    }
    return batch_script(
        SlurmJob(**(job | {"nodes": [2], "ranks_per_node": 2, "gpus": False, "cpus_per_rank": 1} | changes))
    )


@pytest.mark.parametrize(
    ("sizes", "nodes", "each", "found"),
    [
        ([16, 32], None, None, ([2], 8)),
        ([4], None, None, ([1], 4)),
        ([4], None, 2, ([2], 2)),
        ([4], "2", None, ([2], 2)),
        ([16, 32], "4", None, ([4], 4)),
        ([16, 32], "4", 8, ([4], 8)),
        ([32, 16, 8], "1-4", None, ([4, 2, 1], 8)),
        ([16, 24], "1-2", None, ([2], 8)),
    ],
)
def test_nodes_and_ranks_come_from_the_layouts(
    sizes: Sequence[int], nodes: str | None, each: int | None, found: tuple[list[int], int]
) -> None:
    assert fitting_nodes([plan_colocated(["text"], size, 1, 1) for size in sizes], nodes, each) == found


@pytest.mark.parametrize(
    ("nodes", "each", "said"),
    [
        (
            "3",
            None,
            "--nodes: 3 node(s) of 8 rank(s) fit none of the layouts, which use 16, 32 rank(s); use --nodes 2 or 4,",
        ),
        ("0", None, "--nodes: '0' is no number of nodes; give one, as 4, or a range, as 2-4"),
        ("two", None, "--nodes: 'two' is no number of nodes"),
        ("4-2", None, "--nodes: 4-2 ends before it begins; did you mean 2-4?"),
        (None, 5, "layouts.0: 16 ranks do not fill nodes of 5; give --nodes, or --ranks-per-node that divides 16"),
    ],
)
def test_nodes_that_fit_no_layout_are_refused(nodes: str | None, each: int | None, said: str) -> None:
    with pytest.raises(InputError) as error:
        fitting_nodes([plan_colocated(["text"], size, 1, 1) for size in (16, 32)], nodes, each)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("time", ["90", "90:00", "1:30:00", "1-0", "1-2:30", "1-2:30:15", "UNLIMITED"])
def test_time_limits_are_given_as_sbatch_takes_them(time: str) -> None:
    assert f"\n#SBATCH --time={time}\n" in script(time=time)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": "1h"}, "--time: '1h' is no time limit; give minutes, hours:minutes:seconds or "),
        ({"time": "1-"}, "--time: '1-' is no time limit"),
        ({"time": "5:00"}, "--time: 5:00 is over before the ranks are told to stop, 300 s before its end (--grace)"),
        ({"cache": "store"}, "--cache: 'store' is no absolute path of letters"),
        ({"cache": "/tmp/$(id)"}, "--cache: '/tmp/$(id)' is no absolute path of letters"),
        ({"sbatch": ["account=me"]}, "--sbatch: 'account=me' is no option of sbatch; give one, as --sbatch=--account="),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        script(**changes)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("container", "said"),
    [
        (
            Container("pyxis", "a#b:1", "/data:/data"),
            "--container-image='a#b:1' --container-mounts=\"$PWD:$PWD\",/data:/data",
        ),
        (Container("apptainer", "my.sif"), 'apptainer exec --bind="$PWD:$PWD" --pwd="$PWD" my.sif bash -c'),
    ],
)
def test_ranks_start_in_a_container(container: Container, said: str) -> None:
    assert said in script(container=container)


def test_options_of_the_job_and_of_sbatch_stand_on_top() -> None:
    top = script(
        partition="gpu", gpus=True, sbatch=["--account=me"], nodes=[4, 2], time="8:00:00", grace_s=120, cpus_per_rank=3
    )
    wanted = ["nodes=2-4", "cpus-per-task=6", "gpus-per-node=2", "partition=gpu", "open-mode=append", "requeue"]
    for option in [*wanted, "signal=USR1@120", "account=me", "time=8:00:00"]:
        assert f"\n#SBATCH --{option}\n" in top.split("set ")[0]


def run_as_slurm(text: str, folder: Path, codes: Sequence[int]) -> tuple[int, list[list[str]]]:
    """Exit code of the script and the calls of Slurm's commands, where srun ends with each of ``codes`` in turn."""
    commands = folder / "bin"
    commands.mkdir()
    calls, left = folder / "calls", folder / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    (commands / "srun").write_text(
        f'#!/bin/bash\nprintf "%q " srun "$@" >> {calls}; echo >> {calls}\n'
        f"code=$(head -n 1 {left}); sed -i 1d {left}; exit $code\n"
    )
    (commands / "scontrol").write_text(
        f'#!/bin/bash\nif [ "$1" = show ]; then echo first; echo second; else echo scontrol "$@" >> {calls}; fi\n'
    )
    (commands / "sleep").write_text("#!/bin/bash\n")
    for command in commands.iterdir():
        command.chmod(0o755)
    environment = {"PATH": f"{commands}:{os.defpath}:/usr/bin:/bin", "SLURM_JOB_ID": "20007", "USER": "me"}
    environment |= {"SLURM_JOB_NODELIST": "n[0-2]", "SLURM_JOB_NUM_NODES": "3"}
    done = subprocess.run(
        ["bash"], input=text, env=environment, text=True, capture_output=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, [shlex.split(line) for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("codes", "exit_code", "commands"),
    [
        ([0], 0, ["srun"]),
        ([2], 2, ["srun"]),  # bad input would only come again
        ([3], 3, ["srun"]),  # so would divergence
        ([137, 1, 0], 0, ["srun", "srun", "srun"]),
        ([1, 1, 1], 1, ["srun", "srun", "srun"]),
        ([75], 75, ["srun", "scontrol"]),
        ([137, 143], 143, ["srun", "srun", "scontrol"]),  # SIGTERM before the ranks listened
    ],
)
def test_what_becomes_of_a_job_when_its_ranks_have_ended(
    tmp_path: Path, codes: Sequence[int], exit_code: int, commands: list[str]
) -> None:
    ended, calls = run_as_slurm(script(max_restarts=2), tmp_path, codes)
    assert (ended, [call[0] for call in calls]) == (exit_code, commands)
    if "scontrol" in commands:
        assert calls[-1] == ["scontrol", "requeue", "20007"]


def test_ranks_get_the_configuration_word_for_word_and_take_the_nodes_that_a_layout_fits(tmp_path: Path) -> None:
    text = script(nodes=[4, 2, 1], cache="/scratch/$USER/store")
    code, (make, copy, ranks) = run_as_slurm(text, tmp_path, [0, 0, 0])
    settings = ["--config", "my run.yaml"]
    assert code == 0
    assert make[-6:] == ["ultrafuser_mega", "prepare", *settings, "--", "a.b=it's"]
    assert copy[-7:] == ["prepare", "--copy-to", "/scratch/me/store", *settings, "--", "a.b=it's"]
    assert ranks[1:4] == ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]  # of three that the job was given
    wanted = ["python3", "-m", "ultrafuser_mega.cli.rank", *settings, "--requeue", "--", "a.b=it's"]
    assert ranks[-9:] == [*wanted, "data.store=/scratch/me/store"]


def test_the_example_is_as_the_command_writes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    _, command = EXAMPLE.read_text().splitlines()[1].split(": ", 1)
    assert ultrafuser(monkeypatch, *shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == EXAMPLE.read_text()


def test_without_slurm_submitting_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    # In a container nothing is looked at from here.
    assert ultrafuser(monkeypatch, "slurm", "--submit", "--apptainer", "my.sif") == 2
    said = "error: --submit: there is no sbatch on this machine; write the script and submit it where Slurm is\n"
    assert capsys.readouterr().err == said
