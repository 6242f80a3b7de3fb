"""A run harms no other and loses nothing of its own: names, locks, earlier runs, divergence, cut-off evaluations."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support.trio import CPU, ONE, config_tree, draw_nothing

from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import FuserConfig, load_config
from ultrafuser_mega.convert.export import export
from ultrafuser_mega.errors import DivergedError, InputError
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training import stage
from ultrafuser_mega.training.run import run
from ultrafuser_mega.training.run_folder import locked_run

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def short_run(trio: Path, runs: Path) -> dict[str, Any]:
    tree = config_tree(trio, runs, ONE)
    tree["stage2"] |= {"steps": 2}
    return tree


@pytest.fixture
def tree(trio: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of two steps in each stage on one rank."""
    return short_run(trio, tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``runs`` of such a run when it is over, evaluated after every step; read only."""
    tree = short_run(trio, tmp_path_factory.mktemp("finished"))
    return train(tree | {"evaluation": tree["evaluation"] | {"every": 1}}).parent


@pytest.fixture
def run_dir(finished: Path, tree: dict[str, Any]) -> Path:
    """The folder of ``tree``'s run, made a copy of the finished one."""
    tree["evaluation"] |= {"every": 1}
    return Path(shutil.copytree(finished, tree["runs"])) / tree["name"]


def train(tree: dict[str, Any], resume: bool = False) -> Path:
    """Run it; returns its folder. What ends it is raised here with its type and message."""
    kind, message = run_ranks(_train_rank, 1, tree, resume, timeout_s=120)[0]
    if kind is not None:
        raise {"InputError": InputError, "DivergedError": DivergedError}[kind](message)
    return FuserConfig.model_validate(tree).run_dir


def _train_rank(rank: int, tree: dict[str, Any], resume: bool) -> tuple[str | None, str]:
    draw_nothing()
    try:
        run(preflight(FuserConfig.model_validate(tree), 1, resume), CPU)
    except (InputError, DivergedError) as error:
        return type(error).__name__, str(error)
    return None, ""


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", [".", "..", ".hidden", "a/b", "", "x" * 101])
def test_a_name_is_a_plain_folder_name(name: str) -> None:
    with pytest.raises(InputError, match=r"^the embedded default: name: "):
        load_config(None, [f"name={json.dumps(name)}"])


def test_a_specialist_may_be_called_loss(run_dir: Path, tree: dict[str, Any]) -> None:
    expected = records(run_dir, "step")
    tree["name"] = "renamed"
    tree["specialists"]["loss"] = tree["specialists"].pop("math")
    found = records(train(tree), "step")
    assert [step["loss"] for step in found] == [step["loss"] for step in expected]
    assert found[0]["gate"]["text"].keys() == {"text", "code", "loss"}


def test_a_run_out_of_time_is_gone_on_with_as_if_it_had_not_stopped(finished: Path, tree: dict[str, Any]) -> None:
    tree["evaluation"] |= {"every": 1}
    tree["checkpoint"] = {"stop_after_minutes": 0}  # a step more every time
    run_dir = train(tree)
    for end in (Progress(1, 1), Progress(1, 2), Progress(2, 1), Progress(2, 2)):
        assert list_checkpoints(run_dir / "checkpoints")[-1][0] == end
        assert not (run_dir / "summary.json").is_file()
        train(tree, resume=True)
    assert (run_dir / "summary.json").is_file()
    for kind in ("step", "eval"):
        parts, whole = records(run_dir, kind), records(finished / tree["name"], kind)
        assert [(r["step"], r["loss"]) for r in parts] == [(r["step"], r["loss"]) for r in whole]


def test_a_clock_that_jumps_changes_nothing(finished: Path, tree: dict[str, Any]) -> None:
    tree["evaluation"] |= {"every": 1}
    tree["checkpoint"] = {"stop_after_minutes": 60}
    run_ranks(_train_while_the_clock_jumps, 1, tree, timeout_s=120)
    steps = records(FuserConfig.model_validate(tree).run_dir, "step")
    assert [(r["step"], r["loss"]) for r in steps] == [
        (r["step"], r["loss"]) for r in records(finished / tree["name"], "step")
    ]
    assert all(0 < r["seconds"] < 3600 and r["data_seconds"] >= 0 for r in steps)


def _train_while_the_clock_jumps(rank: int, tree: dict[str, Any]) -> None:
    real, jumps = time.time, itertools.cycle([0, 86_400, -86_400])
    time.time = lambda: real() + next(jumps)
    assert _train_rank(rank, tree, resume=False) == (None, "")


def test_divergence_is_one_line_and_never_replaces_a_good_checkpoint(tree: dict[str, Any]) -> None:
    tree["stage2"] |= {"lr": 1e37, "warmup_steps": 0, "schedule": "constant"}
    tree["optimizer"] = {"weight_decay": 1e4}  # one step takes weights beyond float32
    tree["checkpoint"] = {"every": 1, "keep": 1}
    with pytest.raises(DivergedError, match=r"(not finite|is nan|is inf).*last good checkpoint is stage1-step0000002"):
        train(tree)
    run_dir = FuserConfig.model_validate(tree).run_dir
    ((progress, _),) = list_checkpoints(run_dir / "checkpoints")
    assert (progress.stage, progress.step) == (1, 2)
    tree["stage2"] |= {"lr": 1e-4}
    tree["optimizer"] = {}
    assert (train(tree, resume=True) / "summary.json").is_file()


def test_weights_that_are_finite_but_ruined_never_replace_a_good_checkpoint(tree: dict[str, Any]) -> None:
    tree["stage2"] |= {"steps": 3, "lr": 3.0, "schedule": "constant"}
    tree["checkpoint"] = {"every": 1, "keep": 1}
    with pytest.raises(
        DivergedError, match=r"ruined weights.*last good checkpoint is stage1-step0000002: --resume.*smaller lr$"
    ):
        train(tree)
    run_dir = FuserConfig.model_validate(tree).run_dir
    assert [progress for progress, _ in list_checkpoints(run_dir / "checkpoints")] == [Progress(1, 2)]
    assert len(records(run_dir, "step")) == 5  # it might have recovered
    tree["stage2"] |= {"lr": 1e-4}
    assert (train(tree, resume=True) / "summary.json").is_file()


def test_a_spike_that_passes_delays_a_checkpoint_and_ends_nothing(tree: dict[str, Any]) -> None:
    tree["stage1"] |= {"steps": 0}
    tree["stage2"] |= {"steps": 6}
    tree["checkpoint"] = {"every": 2, "keep": 9}
    # As measured before the stage; after step 2, in the spike; after 3, because of it; after 4 and 6, which are due.
    run_ranks(_train_with_measured_losses, 1, tree, [1.0, 1.8, 1.6, 1.2, 0.9], timeout_s=120)
    checkpoints = FuserConfig.model_validate(tree).run_dir / "checkpoints"
    assert [progress.step for progress, _ in list_checkpoints(checkpoints)] == [3, 4, 6]


def _train_with_measured_losses(rank: int, tree: dict[str, Any], losses: list[float]) -> None:
    left = iter(losses)
    stage.measured_loss = lambda *of: next(left)
    run(preflight(FuserConfig.model_validate(tree), 1, resume=False), CPU)
    assert list(left) == []


def test_broken_weights_of_a_specialist_are_named_before_training(
    trio: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(trio, tmp_path / "trio")
    tree["models"] = str(tmp_path / "trio")
    path = tmp_path / "trio" / "code" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DivergedError, match=r"held-out loss of code on text is nan; look at its weights$"):
        train(tree)


def test_bad_input_leaves_the_earlier_run_where_it_is(run_dir: Path, tree: dict[str, Any]) -> None:
    tree["data"] |= {"max_length": 150}
    with pytest.raises(InputError, match="made from other inputs"):
        train(tree)
    assert (run_dir / "summary.json").is_file()
    assert not run_dir.with_name(f"{run_dir.name}.1").exists()


def test_a_second_job_of_the_same_name_is_refused(tree: dict[str, Any]) -> None:
    run_dir = FuserConfig.model_validate(tree).run_dir
    run_dir.mkdir(parents=True)
    with FileLock(run_dir / ".lock"), pytest.raises(InputError, match="another job is training under this name"):
        train(tree)
    with locked_run(run_dir, enabled=True):
        pass


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(run_dir: Path, tree: dict[str, Any]) -> None:
    whole = records(run_dir, "eval")
    (path,) = (path for progress, path in list_checkpoints(run_dir / "checkpoints") if progress.stage == 1)
    for other in (run_dir / "checkpoints").iterdir():  # as if killed behind the first stage's last checkpoint
        if other != path:
            shutil.rmtree(other)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = [line for line in lines if json.loads(line)["step"] < 2 or json.loads(line)["kind"] == "step"]
    (run_dir / "metrics.jsonl").write_text("".join(cut))
    train(tree, resume=True)
    assert [(e["step"], e["loss"]) for e in records(run_dir, "eval")] == [(e["step"], e["loss"]) for e in whole]
    assert "after_stage1" in json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("left_out", ["stage1", "stage2"])
def test_a_run_of_one_stage_reports_and_exports_that_one(tree: dict[str, Any], tmp_path: Path, left_out: str) -> None:
    tree[left_out] |= {"steps": 0, "samples_per_class": 1000}  # of which there are not as many
    run_dir = train(tree)
    assert [(step["stage"], step["step"]) for step in records(run_dir, "step")] == [
        (2 if left_out == "stage1" else 1, step) for step in (1, 2)
    ]
    export(run_dir, tmp_path / "release", verify=False)
    card = (tmp_path / "release" / "README.md").read_text()
    assert "One stage, " in card
    results = card[card.index("## Results") :]
    assert "Held-out loss" in results and "after stage 1" not in results
    train(tree, resume=True)


def test_a_finished_run_resumed_is_as_it_was(run_dir: Path, tree: dict[str, Any]) -> None:
    before = (run_dir / "metrics.jsonl").read_text()
    train(tree, resume=True)
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_lost_metrics_do_not_keep_a_run_from_its_end(run_dir: Path, tree: dict[str, Any]) -> None:
    (run_dir / "metrics.jsonl").unlink()
    tree["stage2"] |= {"steps": 3}
    train(tree, resume=True)
    results = (run_dir / "results.md").read_text()
    assert "| fused |" in results.replace("**", "") and "| code |" not in results.partition("gate weight")[0]


@pytest.mark.parametrize("what", ["run", "runs"])
def test_a_run_folder_that_is_a_file_is_refused_by_plan(tree: dict[str, Any], tmp_path: Path, what: str) -> None:
    if what == "run":
        (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run" if what == "run" else tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"runs, name: .* is a file; choose another runs folder or name"):
        preflight(FuserConfig.model_validate(tree), 1, resume=False)


def test_a_schedule_that_cannot_be_followed_ends_the_run_before_it_starts(tree: dict[str, Any]) -> None:
    tree["stage2"] |= {"min_lr": 0.1}
    with pytest.raises(InputError, match=r"^stage2\.min_lr: 0\.1 is more than stage2\.lr, 0\.0005; make it smaller$"):
        preflight(FuserConfig.model_validate(tree), 1, resume=False)


def test_a_key_that_stands_twice_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(tree) + "seed: 1\nseed: 2\n")
    with pytest.raises(InputError, match="seed stands twice"):
        load_config(path)


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--bogus", 2)])
def test_what_there_is_to_say_about_the_command_line_is_said_once(flag: str, code: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/pretrain_fuser.py", flag]
    result = subprocess.run(
        [sys.executable, *command],
        cwd=PROJECT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode == 0) == (code == 0)
    assert (result.stdout + result.stderr).count("Usage: ") == 1


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_train_ended_by_a_signal_leaves_no_process_behind(
    tree: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    tree["stage1"] |= {"steps": 5000}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    program = "from ultrafuser_mega.cli import main; main()"
    arguments = [sys.executable, "-c", program, "train", "--config", str(tmp_path / "c.yaml"), "--ranks", "1"]
    with subprocess.Popen(
        arguments, cwd=PROJECT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        metrics, until = tmp_path / "runs" / "run" / "metrics.jsonl", time.monotonic() + 100
        while not (metrics.is_file() and '"kind": "step"' in metrics.read_text()) and time.monotonic() < until:
            time.sleep(0.2)
        assert metrics.is_file()
        process.send_signal(number)
        process.wait(timeout=60)
    with FileLock(metrics.parent / ".lock", timeout=30 if number == signal.SIGKILL else 10):
        pass
    size = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == size
