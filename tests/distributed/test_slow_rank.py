"""A rank that takes longer than its equals is named in the run's output, by what all ranks measured of their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.trio import CPU, ONE, config_tree, draw_nothing

from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.planning.preflight import preflight
from ultrafuser_mega.reporting.run_report import RunReport
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.spawn import run_ranks
from ultrafuser_mega.training.run import run
from ultrafuser_mega.training.stragglers import STEPS

SLOW = 1


def test_the_slow_one_of_three_replicas_is_named_once(trio: Path, tmp_path: Path) -> None:
    tree = config_tree(trio, tmp_path / "runs", ONE | {"dp": 3})
    tree["stage1"] |= {"steps": STEPS + 5}
    tree["stage2"] |= {"steps": 0}
    said, *_ = run_ranks(_train, 3, tree, timeout_s=200)
    (line,) = (line for line in said if "straggler" in line)
    assert line.startswith(f"straggler: rank {SLOW} (text, code, math) took ")
    assert line.endswith(f" times as long as the median of 2 others with equal work, {STEPS} steps in a row")


def _train(rank: int, tree: dict[str, Any]) -> list[str]:
    """Train by a clock that goes on by a second with each phase, on a slow rank by a minute with each loss."""
    draw_nothing()
    said: list[str] = []
    now, before, note = 0.0, "", RunReport.note

    def clock(phases: Phases) -> float:
        nonlocal now, before
        now += 60.0 if rank == SLOW and before == "loss" else 1.0
        before = phases.current
        return now

    def noted(report: RunReport, line: str) -> None:
        said.append(line)
        note(report, line)

    Phases._now = clock  # type: ignore[assignment, method-assign]
    RunReport.note = noted  # type: ignore[assignment, method-assign]
    run(preflight(FuserConfig.model_validate(tree), 3, resume=False), CPU)
    return said
