"""The predictions that the documentation quotes are those that the model makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from predict_mfu import CASES, PROGRAMS, predict

PUBLISHED = Path(__file__).parents[3] / "docs" / "benchmarks" / "predicted_mfu.json"


def test_published_predictions_are_todays() -> None:
    """Where this fails the model has changed: run tools/benchmarks/predict_mfu.py and docs/performance.md again."""
    rows = json.loads(PUBLISHED.read_text())["rows"]
    assert [(row["title"], row["program"]) for row in rows] == [(c.title, name) for c in CASES for name in PROGRAMS]
    for row, (case, program) in zip(rows, [(c, p) for c in CASES for p in PROGRAMS.values()], strict=True):
        step = predict(case, program)
        assert row["mfu"] == pytest.approx(step.mfu, rel=1e-6)
        assert row["memory"] == pytest.approx(step.memory.phases, rel=1e-6)
