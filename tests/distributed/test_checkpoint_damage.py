"""A damaged checkpoint is found before anything is trained and said in one line; the last good one is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import ultrafuser
from support.launched import launch
from support.trio import CPU, DISJOINT_3, ONE, config_tree, read_steps, train

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.launch.rank import train_main
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.prepare import open_store
from ultrafuser_mega.training.run import run_facts
from ultrafuser_mega.training.stage import train_stage
from ultrafuser_mega.training.trainer import Trainer

OLDER, NEWEST = "stage1-step0000002", "stage2-step0000002"


def _tree(trio: Path, runs: Path, layout: dict[str, Any]) -> dict[str, Any]:
    tree = config_tree(trio, runs, layout)
    tree["stage1"] |= {"steps": 2}
    tree["stage2"] |= {"steps": 2}
    return tree | {"evaluation": {"samples_per_class": 3, "token_views": 0}}


@pytest.fixture(scope="module")
def finished(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``runs`` of a run on three ranks with a checkpoint of either stage; read only."""
    runs = tmp_path_factory.mktemp("finished")
    tree = _tree(trio, runs, DISJOINT_3)
    (runs / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    train(tree, 3)
    return runs


@pytest.fixture
def checkpoints(finished: Path, tmp_path: Path) -> Path:
    """Its folder of checkpoints in a copy of the run."""
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs" / "run" / "checkpoints"


def resume(checkpoints: Path) -> tuple[list[int | None], str]:
    runs = checkpoints.parents[1]
    return launch(train_main, runs, runs / "config.yaml", [f"runs={runs}"], True)


def largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut_short(checkpoint: Path) -> Path:
    path = largest(checkpoint)
    with path.open("r+b") as file:
        file.truncate(1000)
    return path


def flip(checkpoint: Path) -> Path:
    path = largest(checkpoint)
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 4000)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    path.write_bytes(data)
    return path


def remove(name: str) -> Callable[[Path], Path]:
    def damage(checkpoint: Path) -> Path:
        (checkpoint / name).unlink()
        return checkpoint / name

    return damage


def replace(text: str) -> Callable[[Path], Path]:
    def damage(checkpoint: Path) -> Path:
        (checkpoint / "progress.json").write_text(text)
        return checkpoint / "progress.json"

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(cut_short, "damaged: 1000 bytes there, ", id="distcp_cut_short"),
        pytest.param(flip, "damaged: its checksum is ", id="distcp_flipped"),
        pytest.param(remove("__2_0.distcp"), "missing", id="no_distcp"),
        pytest.param(remove(".metadata"), "missing", id="no_index"),
        pytest.param(remove("sources/code/config.json"), "missing", id="no_source"),
        pytest.param(replace("[]"), "damaged (TypeError", id="progress_is_a_list"),
        pytest.param(replace("{}"), "damaged (KeyError('identity')", id="progress_is_empty"),
        pytest.param(
            replace('{"identity": {}, "progress": {"stage": 2, "step": "2"}}'), "damaged (", id="step_is_text"
        ),
    ],
)
def test_damage_is_said_and_an_older_checkpoint_taken(
    checkpoints: Path,
    damage: Callable[[Path], Path],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, runs = damage(checkpoints / NEWEST), checkpoints.parents[1]
    assert ultrafuser(monkeypatch, "plan", "--config", runs / "config.yaml", "--resume", f"runs={runs}") == 0
    printed = capsys.readouterr().out.splitlines()
    (told,) = (line for line in printed if line.startswith(f"{path}: {says}"))
    assert told.endswith(f"; goes on from {OLDER}")
    assert f"--resume: goes on from {checkpoints / OLDER}" in printed


def test_every_damaged_checkpoint_is_said_where_two_are(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    oldest = checkpoints / "stage1-step0000001"
    shutil.copytree(checkpoints / OLDER, oldest)
    told_of_itself = json.loads((oldest / "progress.json").read_text())
    told_of_itself["progress"]["step"] = 1
    (oldest / "progress.json").write_text(json.dumps(told_of_itself))
    newest, older = flip(checkpoints / NEWEST), cut_short(checkpoints / OLDER)
    runs = checkpoints.parents[1]
    assert ultrafuser(monkeypatch, "plan", "--config", runs / "config.yaml", "--resume", f"runs={runs}") == 0
    told = [line for line in capsys.readouterr().out.splitlines() if ": damaged: " in line]
    assert [line.split(": damaged: ")[0] for line in told] == [str(newest), str(older)]
    assert told[-1].endswith(f"; goes on from {oldest.name}")


def test_a_run_goes_on_from_the_older_checkpoint_and_says_why(checkpoints: Path) -> None:
    path = flip(checkpoints / NEWEST)
    codes, errors = resume(checkpoints)
    assert codes == [0, 0, 0]
    (told,) = (line for line in errors.splitlines() if line.startswith(f"{path}: damaged: its checksum is "))
    assert told.endswith(f"; goes on from {OLDER}")
    assert [path.name for _, path in list_checkpoints(checkpoints)] == [OLDER, NEWEST]
    assert [step["step"] for step in read_steps(checkpoints.parent)] == [1, 2, 3, 4]


def test_a_plan_says_that_a_whole_checkpoint_was_compared_and_refuses_a_damaged_one_to_begin_with(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, newest = checkpoints.parents[1], checkpoints / NEWEST
    arguments = ("plan", "--config", runs / "config.yaml", f"runs={runs}")
    compared = f"checked: every file of {newest} has the size and the checksum that it was written with"
    for options in (("--resume",), (f"checkpoint.start={newest}", "name=another")):
        assert ultrafuser(monkeypatch, *arguments, *options) == 0
        assert compared in capsys.readouterr().out.splitlines()
    path = flip(newest)
    assert ultrafuser(monkeypatch, *arguments, f"checkpoint.start={newest}", "name=another") == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: damaged: its checksum is ")


@pytest.mark.parametrize("older", ["gone", "damaged"])
def test_where_all_are_damaged_the_oldest_is_named(checkpoints: Path, older: str) -> None:
    flip(checkpoints / NEWEST)
    last = NEWEST
    if older == "gone":
        shutil.rmtree(checkpoints / OLDER)
    else:
        flip(checkpoints / OLDER)
        last = OLDER
    _, errors = resume(checkpoints)
    assert errors.endswith(f"copy the checkpoint again, or remove {last} and start afresh: there is no older one\n")
    assert errors.count("\n") == 1


def test_checkpoint_of_the_first_versions_without_checksums_still_loads(checkpoints: Path) -> None:
    path = checkpoints / OLDER / "progress.json"
    record = json.loads(path.read_text())
    del record["files"]
    path.write_text(json.dumps(record))
    shutil.rmtree(checkpoints / NEWEST)
    codes, _ = resume(checkpoints)
    assert codes == [0, 0, 0]


def test_every_file_but_the_note_itself_is_noted(finished: Path) -> None:
    checkpoint = finished / "run" / "checkpoints" / NEWEST
    noted = json.loads((checkpoint / "progress.json").read_text())["files"]
    there = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    del there["progress.json"]
    assert {name: record["bytes"] for name, record in noted.items()} == {
        name: path.stat().st_size for name, path in there.items()
    }


def test_saving_needs_the_specialists_folders_no_more(trio: Path, tmp_path: Path) -> None:
    shutil.copytree(trio, tmp_path / "models")
    tree = _tree(tmp_path / "models", tmp_path, ONE)
    run_ranks(_train_while_the_folders_go_away, 1, tree, tmp_path / "models" / "code")
    kept = tmp_path / "run" / "checkpoints" / OLDER / "sources" / "code"
    names = [path.name for path in (trio / "code").iterdir() if path.suffix != ".safetensors"]
    assert sorted(path.name for path in kept.iterdir()) == sorted(names)
    assert all((kept / name).read_bytes() == (trio / "code" / name).read_bytes() for name in names)


def _train_while_the_folders_go_away(rank: int, tree: dict[str, Any], folder: Path) -> None:
    plan = preflight(FuserConfig.model_validate(tree), 1, resume=False)
    groups = make_groups(plan.layout)
    store = open_store(plan, groups)
    trainer = Trainer(plan, groups, store, CPU, make_shard(plan, groups))
    trainer.load()
    with RunReport(run_facts(plan, CPU), enabled=True, done_steps=0) as report:
        shutil.rmtree(folder)
        train_stage(trainer, Progress(1, 0), report)
