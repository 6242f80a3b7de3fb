"""metrics.jsonl, TensorBoard and summary.json hold what was recorded, also after a resume or a crash."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.records import (
    EvalRecord,
    MetricsWriter,
    StepRecord,
    build_summary,
    read_metrics,
    write_summary,
)


def _write(run_dir: Any, steps: Any, evals: Any = (), *, resume_step: Any = None) -> None:
    with MetricsWriter(run_dir, resume_step=resume_step) as writer:
        for record in steps:
            writer.write_step(record)
        for record in evals:
            writer.write_eval(record)


def _scalars(run_dir: Any) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_metrics_file_gives_back_every_record(tmp_path: Path, steps: Any, after_stage1: Any, final: Any) -> None:
    _write(tmp_path, steps, [after_stage1, final])
    assert read_metrics(tmp_path) == (steps, [after_stage1, final])


def test_every_line_is_one_json_object_and_is_on_disk_at_once(tmp_path: Path, step_of: Any) -> None:
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write_step(step_of(1))
        line = (tmp_path / "metrics.jsonl").read_text()
    assert line.endswith("\n") and line.count("\n") == 1
    assert json.loads(line)["kind"] == "step"


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path, step_of: Any) -> None:
    _write(tmp_path, [step_of(1, loss=math.nan, grad_norm=math.inf)])
    data = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert data["loss"] is None and data["grad_norm"] is None
    (record,), _ = read_metrics(tmp_path)
    assert math.isnan(record.loss) and math.isnan(record.grad_norm)


def test_numpy_scalars_are_written_as_numbers(tmp_path: Path, step_of: Any) -> None:
    _write(tmp_path, [step_of(1, loss=np.float32(2.5), tokens=np.int64(7))])
    (record,), _ = read_metrics(tmp_path)
    assert (record.loss, record.tokens) == (2.5, 7)


def test_resume_drops_the_records_after_the_resumed_step(tmp_path: Path, step_of: Any, after_stage1: Any) -> None:
    _write(tmp_path, [step_of(step) for step in range(1, 11)], [after_stage1])  # the evaluation is of step 8
    _write(tmp_path, [step_of(step, lr=1e-5) for step in (8, 9)], resume_step=7)
    steps, evals = read_metrics(tmp_path)
    assert [record.step for record in steps] == [*range(1, 8), 8, 9]
    assert [record.lr for record in steps][-3:] == [2e-3, 1e-5, 1e-5]
    assert evals == []


def test_resume_drops_the_evaluation_of_the_resumed_step_which_is_done_again(
    tmp_path: Path, step_of: Any, after_stage1: Any
) -> None:
    _write(tmp_path, [step_of(step) for step in range(1, 9)], [after_stage1])
    _write(tmp_path, [], [after_stage1], resume_step=after_stage1.step)
    steps, evals = read_metrics(tmp_path)
    assert [record.step for record in steps] == [*range(1, 9)]
    assert evals == [after_stage1]


def test_resume_drops_a_last_line_that_was_cut_off(tmp_path: Path, step_of: Any) -> None:
    _write(tmp_path, [step_of(1), step_of(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    _write(tmp_path, [step_of(2, lr=1e-5)], resume_step=2)
    steps, _ = read_metrics(tmp_path)
    assert [(record.step, record.lr) for record in steps] == [(1, 2e-3), (2, 1e-5)]


def test_a_fresh_run_replaces_the_records_of_an_earlier_one(tmp_path: Path, step_of: Any) -> None:
    _write(tmp_path, [step_of(1), step_of(2)])
    _write(tmp_path, [step_of(1, lr=1e-5)])
    steps, _ = read_metrics(tmp_path)
    assert [record.lr for record in steps] == [1e-5]


@pytest.mark.parametrize("damage", ["{not json}\n", "[1, 2]\n", '{"kind": "step"}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, step_of: Any, damage: str) -> None:
    _write(tmp_path, [step_of(1), step_of(2)])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + damage + second)
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2"):
        MetricsWriter(tmp_path, resume_step=2)


def test_reading_a_folder_without_metrics_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


def test_a_record_with_unknown_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "perplexity": 3}\n')
    with pytest.raises(InputError, match="line 1: not a record of this program"):
        read_metrics(tmp_path)


def test_records_of_an_earlier_version_are_read_without_what_it_did_not_measure(
    tmp_path: Path, step_of: Callable[..., StepRecord]
) -> None:
    new = ("processed_tokens", "data_seconds", "peak_memory_bytes")
    _write(tmp_path, [step_of(1)])
    path = tmp_path / "metrics.jsonl"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key not in new}) + "\n")
    _write(tmp_path, [step_of(2, data_seconds=0.5)], resume_step=1)
    (before, after), _ = read_metrics(tmp_path)
    assert (before.tokens, after.data_seconds) == (1400, 0.5)
    assert all(math.isnan(getattr(before, name)) for name in new)


def test_tensorboard_holds_numbers_by_their_names_in_the_records(
    tmp_path: Path, step_of: Any, final: Any, with_yardsticks: Any
) -> None:
    evaluation = replace(final, yardsticks=with_yardsticks.yardsticks)
    _write(tmp_path, [step_of(1, phases={"exchange": {"mean": 0.1, "worst": 0.2}})], [evaluation])
    events = _scalars(tmp_path)
    names = set(events.Tags()["scalars"])
    assert {"loss", "class_loss/text", "lr", "tokens_per_s", "gate/math/code", "phases/exchange/worst"} <= names
    assert "data_seconds" not in names  # which this record has not measured
    assert {"eval/loss/text/fused", "eval/gate/math/code", "eval/loss/mean/fused"} <= names
    assert {"eval/yardsticks/text/oracle per token", "eval/yardsticks/mean/uniform logits"} <= names
    (event,) = events.Scalars("eval/loss/code/math")
    assert (event.step, event.value) == (12, pytest.approx(6.90))


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path, step_of: Any) -> None:
    _write(tmp_path, [step_of(step) for step in range(1, 6)])
    _write(tmp_path, [step_of(step, lr=1e-5) for step in (4, 5, 6)], resume_step=3)
    curve = [(event.step, event.value) for event in _scalars(tmp_path).Scalars("lr")]
    assert curve == [(step, pytest.approx(2e-3 if step <= 3 else 1e-5)) for step in range(1, 7)]


def test_summary_is_nested_as_documented(tmp_path: Path, final: Any, after_stage1: Any) -> None:
    summary = build_summary(
        final, tokens_per_s=900.0, steps=12, layout="disjoint", device="cpu", wall_s=60.5, after_stage1=after_stage1
    )
    path = write_summary(tmp_path / "run", summary)
    data = json.loads(path.read_text())
    assert path.name == "summary.json"
    assert data["eval"]["text"] == {"fused": 2.74, "text": 2.90, "code": 5.20, "math": 6.60}
    assert data["eval"]["mean"]["fused"] == pytest.approx((2.74 + 2.24 + 2.79) / 3)
    assert data["gate_per_token"]["code"]["code"] == 0.59
    assert data["train"] == {"tokens_per_s": 900.0}
    assert (data["steps"], data["layout"], data["device"], data["wall_s"]) == (12, "disjoint", "cpu", 60.5)
    assert data["after_stage1"]["eval"]["mean"]["fused"] == pytest.approx((2.80 + 2.20 + 2.85) / 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"]  # the draft is gone


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_summary(tmp_path, {"steps": 1})
    with pytest.raises(TypeError):
        write_summary(tmp_path, {"steps": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 1}


def test_mean_is_given_only_for_models_evaluated_on_every_class() -> None:
    record = EvalRecord(stage=1, step=1, loss={"a": {"fused": 1.0, "x": 2.0}, "b": {"fused": 3.0}}, gate={})
    assert record.mean == {"fused": 2.0}


def test_names_that_the_summary_needs_for_itself_are_refused() -> None:
    with pytest.raises(InputError, match='class name "mean"'):
        EvalRecord(stage=1, step=1, loss={"mean": {"fused": 1.0}}, gate={})
    with pytest.raises(InputError, match='specialist name "fused"'):
        EvalRecord(stage=1, step=1, loss={}, gate={"text": {"fused": 1.0}})
