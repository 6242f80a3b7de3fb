"""A number has one name wherever a run's numbers go: its path in metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ultrafuser_mega.errors import InputError
from ultrafuser_mega.reporting.records import MetricsWriter
from ultrafuser_mega.reporting.sinks import Prometheus, Sink, Wandb, exposition, scalars_of

PHASES = {"exchange": {"mean": 0.125, "worst": 0.25}}


class FakeWandb(SimpleNamespace):
    """wandb, as far as it is used: what was asked of it."""

    def __init__(self) -> None:
        super().__init__(begun=[], logged=[], metrics=[], Error=RuntimeError, Settings=lambda **options: options)

    def init(self, **options: Any) -> FakeWandb:
        if options["project"] == "forbidden":
            raise RuntimeError("no API key\n  configured")
        self.begun.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.logged.append({})


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def paths(record: dict[str, Any], prefix: str = "") -> set[str]:
    """Those of all numbers of a line of metrics.jsonl."""
    found = set()
    for name, value in record.items():
        found |= (
            paths(value, f"{prefix}{name}/")
            if isinstance(value, dict)
            else {prefix + name}
            if value is not None
            else set()
        )
    return found


def write(folder: Path, sink: Sink, steps: list[Any], final: Any) -> None:
    with MetricsWriter(folder, resume_step=None, sinks=[sink]) as writer:
        for record in steps:
            writer.write_step(record)
        writer.write_eval(final)


def test_what_was_not_measured_goes_nowhere() -> None:
    assert scalars_of({"loss": 1, "mfu": math.nan, "phases": PHASES}) == {
        "loss": 1.0,
        "phases/exchange/mean": 0.125,
        "phases/exchange/worst": 0.25,
    }


def test_wandb_gets_the_names_of_metrics_jsonl(tmp_path: Path, step_of: Any, final: Any, wandb: FakeWandb) -> None:
    write(tmp_path, Wandb("fusers", "demo", tmp_path, {"seed": 1}), [step_of(1, phases=PHASES), step_of(2)], final)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(wandb.logged[0]) == paths(lines[0]) - {"kind"}
    mean = {f"eval/loss/mean/{model}" for model in final.models}
    evaluated = {name for name in paths(lines[2], "eval/") if name.startswith(("eval/loss/", "eval/gate/"))}
    assert set(wandb.logged[2]) == evaluated | mean | {"step"}
    assert wandb.logged[3] == {} and wandb.metrics == [("*", "step")]


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        Wandb("fusers", "demo", tmp_path, {}).close()
    first, again = wandb.begun
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["dir"]) == ("fusers", "demo", str(tmp_path))


def test_what_wandb_refuses_is_one_line(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(InputError, match=r"^report\.wandb: forbidden: no API key configured; wandb login"):
        Wandb("forbidden", "demo", tmp_path, {})


def test_prometheus_reads_gauges_whose_labels_are_the_rest_of_the_path() -> None:
    scalars = {"lr": 1e-3, "gate/math/text": 0.25, "gate/math/code": 0.75, "eval/loss/mean/fused": 2.0}
    scalars |= {"phases/exchange/worst": 0.25}
    assert exposition(scalars, "demo") == (
        "# TYPE ultrafuser_lr gauge\n"
        'ultrafuser_lr{run="demo"} 0.001\n'
        "# TYPE ultrafuser_gate gauge\n"
        'ultrafuser_gate{run="demo",class="math",specialist="text"} 0.25\n'
        'ultrafuser_gate{run="demo",class="math",specialist="code"} 0.75\n'
        "# TYPE ultrafuser_eval_loss gauge\n"
        'ultrafuser_eval_loss{run="demo",class="mean",model="fused"} 2.0\n'
        "# TYPE ultrafuser_phases gauge\n"
        'ultrafuser_phases{run="demo",phase="exchange",of="worst"} 0.25\n'
    )


def test_the_file_for_prometheus_holds_the_last_step_and_the_last_evaluation(
    tmp_path: Path, step_of: Any, final: Any
) -> None:
    file = tmp_path / "collected" / "demo.prom"
    file.parent.mkdir()
    write(tmp_path, Prometheus(file, "demo", pytest.fail), [step_of(1, phases=PHASES), step_of(2)], final)
    text = file.read_text()
    assert 'ultrafuser_step{run="demo"} 2.0\n' in text and 'ultrafuser_eval_step{run="demo"} 12.0\n' in text
    assert "ultrafuser_phases" not in text  # step 2 has none
    assert all(
        re.fullmatch(r'# TYPE \w+ gauge|\w+\{(\w+="[\w.-]+",?)+\} [-+.e\d]+', line) for line in text.splitlines()
    )
    assert [path.name for path in file.parent.iterdir()] == ["demo.prom"]


def test_a_file_that_cannot_be_written_any_more_is_said_once_and_tried_again(tmp_path: Path) -> None:
    folder, said = tmp_path / "collected", list[str]()
    folder.mkdir()
    sink = Prometheus(folder / "demo.prom", "demo", said.append)
    (folder / "demo.prom").unlink()
    folder.rmdir()
    sink.write({"loss": 1.0}, 1)
    sink.write({"loss": 2.0}, 2)
    assert len(said) == 1 and "demo.prom: cannot be written now" in said[0]
    folder.mkdir()
    sink.write({"loss": 3.0}, 3)
    assert 'ultrafuser_loss{run="demo"} 3.0' in (folder / "demo.prom").read_text()


def test_a_folder_that_is_not_there_is_one_line_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/demo\.prom: cannot be read or written"):
        Prometheus(tmp_path / "nowhere" / "demo.prom", "demo", pytest.fail)
