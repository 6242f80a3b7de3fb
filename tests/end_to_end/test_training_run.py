"""What a user gets from one torchrun: every file, every key, and each line once although there are two ranks."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.trio import COLOCATED_TP2, config_tree, read_steps, train

from ultrafuser_mega.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CLASSES = SPECIALISTS = ("text", "code", "math")


def _torchrun(ranks: int, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, str(ROOT / "examples" / "pretrain_fuser.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture(scope="module")
def finished(trio: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of 3 + 4 steps on two ranks: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(trio, folder / "runs", COLOCATED_TP2)))
    result = _torchrun(2, "--config", str(config), "stage1.steps=3", "stage2.steps=4", "evaluation.every=2",
                       "evaluation.token_views=1", f"report.prometheus={folder}/run.prom",
                       "profile.steps=5:6", "profile.ranks=[1]")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "run", result


def test_summary_holds_losses_gate_and_speed(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    for place in (*CLASSES, "mean"):
        assert set(summary["eval"][place]) == {"fused", *SPECIALISTS}
    for name in CLASSES:
        assert sum(summary["gate_per_token"][name][other] for other in SPECIALISTS) == pytest.approx(1.0, abs=1e-5)
    for name in CLASSES:  # of the specialists as they came
        yardsticks, best = summary["yardsticks"][name], min(summary["eval"][name][other] for other in SPECIALISTS)
        assert yardsticks["oracle per class"] == pytest.approx(best)
        assert yardsticks["oracle per token"] < yardsticks["oracle per sample"] <= yardsticks["oracle per class"]
        assert yardsticks["uniform probabilities"] > yardsticks["oracle per token"]
    assert summary["steps"] == 7
    assert summary["train"]["tokens_per_s"] > 0
    assert summary["wall_s"] > 0
    assert summary["device"] == "cpu"
    assert summary["layout"].startswith("colocated")


def test_metrics_say_what_a_step_took_and_held(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    steps = read_steps(finished[0])
    for step in steps:
        assert step["tokens_per_s"] == pytest.approx(step["tokens"] / step["seconds"])
        assert step["processed_tokens"] > len(SPECIALISTS) * step["tokens"]
        assert 0 < step["data_seconds"] < step["seconds"]
        assert step["peak_memory_bytes"] > 2**26  # Python with torch alone is more
    assert [s["peak_memory_bytes"] for s in steps] == sorted(s["peak_memory_bytes"] for s in steps)


def test_metrics_say_how_long_the_phases_of_the_step_before_took(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    first, *steps = read_steps(finished[0])
    forward = {f"forward_of_{name}" for name in SPECIALISTS}
    assert first["phases"] == {}
    for before, step in zip([first, *steps], steps, strict=False):
        if before["stage"] != step["stage"]:  # what comes between stages belongs to no step
            assert step["phases"] == {}
            continue
        phases = step["phases"]
        assert {"data", *forward, "exchange", "loss", "backward", "optimizer", "idle", "other"} <= set(phases)
        assert all(0 < phase["mean"] <= phase["worst"] * (1 + 1e-9) for phase in phases.values())
    assert any("evaluation" in step["phases"] for step in steps)
    assert all(step["mfu"] is None and step["memory_bytes"] > 2**26 for step in steps)
    assert steps[-1]["save_seconds"] > 0  # the end of stage 1


def test_prometheus_finds_the_last_numbers(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    text = (finished[0].parents[1] / "run.prom").read_text()
    loss = json.loads((finished[0] / "summary.json").read_text())["eval"]["mean"]["fused"]
    assert f'ultrafuser_eval_loss{{run="run",class="mean",model="fused"}} {loss!r}\n' in text
    assert 'ultrafuser_step{run="run"} 7.0\n' in text


def test_a_profile_has_the_phases_as_ranges_of_the_ranks_that_were_chosen(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder = finished[0] / "profile"
    assert [path.name for path in folder.iterdir()] == ["steps5-6-rank1.json.gz"]
    trace = json.loads(gzip.decompress((folder / "steps5-6-rank1.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    forward = {f"forward of {name}" for name in SPECIALISTS}
    assert {"data", *forward, "exchange", "loss", "backward", "optimizer", "end of step"} <= set(names)
    assert names.count("end of step") == 2
    assert f"profile of steps 5 to 6, rank(s) 1: {folder}\n" in finished[1].stderr


def test_the_gate_is_averaged_per_token_and_per_sample(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    for name in CLASSES:
        assert sum(summary["gate_per_sample"][name].values()) == pytest.approx(1.0, abs=1e-5)
        assert list(summary["gate_per_sample"][name]) == list(summary["gate_per_token"][name])


def test_run_folder_is_complete(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run = finished[0]
    assert load_config(run / "config.yaml").stage1.steps == 3
    for name in ("loss.png", "gate_over_steps.png", "gate_heatmap.png"):
        assert (run / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert "<html" in (run / "plots" / "token_gate.html").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["stage1-step0000003", "stage2-step0000004"]
    assert list((run / "tensorboard").iterdir())
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("step") == 7
    assert kinds.count("eval") == 5  # before training; after stage 1's steps 2 and 3, stage 2's steps 2 and 4


def test_nothing_is_printed_once_per_rank(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    printed = finished[1].stdout + finished[1].stderr
    lines = [line.strip() for line in printed.splitlines() if len(line.strip()) > 12]
    repeated = {line for line in lines if lines.count(line) > 1 and not set(line) <= set("─━ ")}
    assert repeated == set()
    assert "Warning" not in printed
    assert "Traceback" not in printed


def test_resume_goes_on_to_a_later_end_on_fewer_ranks(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run = finished[0]
    config = load_config(run / "config.yaml", ["layouts=[{kind: colocated}]", "stage2.steps=6"])
    assert train(config.model_dump(mode="json"), 1, resume=True) == run
    assert json.loads((run / "summary.json").read_text())["steps"] == 9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_beats_every_specialist(tmp_path: Path) -> None:
    """The embedded default, start to end: the bars that the README's table shows."""
    result = _torchrun(8, f"toy={tmp_path}/toy", f"models={tmp_path}/toy", f"data.root={tmp_path}/toy/data",
                       f"runs={tmp_path}/runs", timeout_s=1700)  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    mean = summary["eval"]["mean"]
    assert all(mean["fused"] < mean[name] for name in SPECIALISTS)
    assert all(summary["after_stage1"]["eval"]["mean"]["fused"] < mean[name] for name in SPECIALISTS)
    for name in CLASSES:
        losses = summary["eval"][name]
        assert losses["fused"] <= 1.02 * min(losses[other] for other in SPECIALISTS)
        assert summary["gate_per_token"][name][name] == max(summary["gate_per_token"][name].values())
