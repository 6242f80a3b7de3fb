"""What is said at the end of a run is what its folder holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultrafuser_mega.reporting.records import EvaluationResult, SampleGate
from ultrafuser_mega.reporting.run_report import RunFacts, RunReport

WEIGHTS = {  # two responses of one class: 4 tokens and 1
    0: np.array([[0.9, 0.1]] * 4),
    1: np.array([[0.4, 0.6]]),
}


def result(oracle: float = 1.4) -> EvaluationResult:
    samples = [SampleGate("law", index, weights, np.ones(len(weights))) for index, weights in WEIGHTS.items()]
    loss = {"law": {"fused": 1.0, "jurist": 1.5, "general": 2.0}}
    gate, yardsticks = {"law": {"jurist": 0.8, "general": 0.2}}, {"law": {"oracle per token": oracle}}
    return EvaluationResult(loss=loss, gate=gate, yardsticks=yardsticks, samples=samples)


def report_of(run_dir: Path, stage_steps: tuple[int, int]) -> RunReport:
    facts = RunFacts(
        name="r",
        run_dir=run_dir,
        config_text="",
        layout="one",
        device="cpu",
        specialists=["jurist", "general"],
        stage_steps=stage_steps,
    )
    return RunReport(facts, enabled=True, done_steps=sum(stage_steps))


def finish(run_dir: Path) -> None:
    with report_of(run_dir, (0, 0)) as report:
        report.finish(result(), [])


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_the_end_names_only_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], with_checkpoint: bool
) -> None:
    (tmp_path / "checkpoints" / ".stage1-step0000001.partial").mkdir(parents=True)
    if with_checkpoint:
        (tmp_path / "checkpoints" / "stage1-step0000001").mkdir()
    finish(tmp_path)
    end = capsys.readouterr().err.splitlines()[-1]
    assert end.startswith(f"{tmp_path} holds summary.json, results.md")
    assert end.endswith("plots/ and checkpoints/" if with_checkpoint else " and plots/")


def test_per_token_long_responses_weigh_more_and_per_sample_they_do_not() -> None:
    assert result().gate_per_sample() == {"law": {"jurist": pytest.approx(0.65), "general": pytest.approx(0.35)}}
    assert result().gate == {"law": {"jurist": 0.8, "general": 0.2}}


def test_both_averages_are_in_the_summary_and_the_table_under_their_names(tmp_path: Path) -> None:
    finish(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gate_per_token"] == {"law": {"jurist": 0.8, "general": 0.2}}
    assert summary["gate_per_sample"]["law"]["jurist"] == pytest.approx(0.65)
    assert "**Average gate weight per token**" in (tmp_path / "results.md").read_text()


def test_yardsticks_are_those_of_the_specialists_as_they_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with report_of(tmp_path, (2, 3)) as report:
        for stage, step, oracle in ((1, 2, 1.4), (2, 4, 1.2)):
            report.evaluated(result(oracle), stage, step)
        report.finish(result(1.1), [])
    assert "| oracle per token    |     1.400 |     1.400 |" in (tmp_path / "results.md").read_text()
    assert "oracle per token      1.400   1.400" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["yardsticks"] == {place: {"oracle per token": 1.4} for place in ("law", "mean")}


@pytest.mark.parametrize(
    ("stage_steps", "evaluations", "said"),
    [
        (
            (2, 3),
            [(1, 0), (1, 2), (2, 4)],
            ["before training", "after stage 1 step 2 of 2", "after stage 2 step 2 of 3"],
        ),
        ((0, 3), [(1, 0), (2, 1)], ["before training", "after stage 2 step 1 of 3"]),
        ((2, 0), [(1, 0), (1, 2)], ["before training", "after stage 1 step 2 of 2"]),
    ],
)
def test_steps_are_said_by_stage_and_a_stage_without_any_is_left_out(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage_steps: tuple[int, int],
    evaluations: list[tuple[int, int]],
    said: list[str],
) -> None:
    with report_of(tmp_path, stage_steps) as report:
        for stage, step in evaluations:
            report.evaluated(result(), stage, step)
        report.finish(result(), [])
    last = ["after stage 2 step 3 of 3"] if stage_steps[1] else []
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("held-out loss")]
    assert lines == [f"held-out loss of the fused model {when}: law 1.0000  mean 1.0000" for when in [*said, *last]]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["step"]) for record in records] == [*evaluations, (2, sum(stage_steps))]
    both = all(stage_steps)
    assert ("after stage 1" in (tmp_path / "results.md").read_text()) == both
    assert ("after_stage1" in json.loads((tmp_path / "summary.json").read_text())) == both


def test_a_rank_that_draws_nothing_imports_no_matplotlib() -> None:
    program = "import sys, ultrafuser_mega.reporting.run_report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
