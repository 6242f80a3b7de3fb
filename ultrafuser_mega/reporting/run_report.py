"""What a run shows and leaves behind, on the one rank that reports: progress, metrics, tables, plots, summary."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import yaml

from ultrafuser_mega.reporting.console import TrainConsole
from ultrafuser_mega.reporting.records import (
    FUSED,
    EvalRecord,
    EvaluationResult,
    MetricsWriter,
    StepRecord,
    build_summary,
    read_metrics,
    write_summary,
)
from ultrafuser_mega.reporting.sinks import Prometheus, Sink, Wandb
from ultrafuser_mega.reporting.tables import gate_table, loss_table, print_tables, to_markdown
from ultrafuser_mega.reporting.token_view import TokenSample, write_token_view


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a report says of a run beyond its numbers."""

    name: str
    run_dir: Path
    config_text: str  # YAML
    layout: str  # in words
    device: str  # its name
    specialists: Sequence[str]
    stage_steps: tuple[int, int]
    trained: str = FUSED  # what people read for the model that the run trains
    resumed_from: Path | None = None  # a checkpoint
    wandb: str | None = None  # project that also gets the numbers
    prometheus: Path | None = None  # file that also gets them


class RunReport:
    """Context manager around a run; with ``enabled`` False (all ranks but one) it does nothing.

    Args:
        facts: of the run.
        enabled: whether this rank reports.
        done_steps: steps that an earlier part of this run did.
    """

    def __init__(self, facts: RunFacts, *, enabled: bool, done_steps: int) -> None:
        self.facts, self.enabled, self.run_dir = facts, enabled, facts.run_dir
        self._resumed_at = done_steps if facts.resumed_from else None
        self._done = done_steps
        self._started = time.perf_counter()
        self._stack = ExitStack()
        self._console = TrainConsole(enabled=enabled)
        self._metrics: MetricsWriter | None = None

    def __enter__(self) -> RunReport:
        self._stack.enter_context(self._console)
        if self.enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(self.facts.config_text)
            writer = MetricsWriter(self.run_dir, resume_step=self._resumed_at, sinks=self._sinks())
            self._metrics = self._stack.enter_context(writer)
            self.note(f"{self.facts.name}: {self.facts.layout} on {self.facts.device}")
            if self.facts.resumed_from:
                self.note(f"resumed from {self.facts.resumed_from}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _sinks(self) -> list[Sink]:
        facts, found = self.facts, list[Sink]()
        if facts.prometheus is not None:
            found.append(Prometheus(facts.prometheus, facts.name, self.note))
        if facts.wandb is not None:
            found.append(Wandb(facts.wandb, facts.name, self.run_dir, yaml.safe_load(facts.config_text)))
        return found

    def note(self, text: str) -> None:
        """One line that stays."""
        self._console.note(text)

    def begin_stage(self, number: int, title: str, first_step: int, steps: int) -> None:
        """Stage ``number`` follows; ``first_step`` is its own first, counted through both stages."""
        self._console.begin_stage(number, title, first_step=first_step, steps=steps)

    def step(self, record: StepRecord) -> None:
        """A training step was done."""
        self._done = record.step
        if self._metrics is not None:
            self._metrics.write_step(record)
        self._console.step(record)

    def evaluated(self, result: EvaluationResult, stage: int, step: int) -> None:
        """An evaluation was done after ``step`` steps, counted through both stages."""
        if self._metrics is None:
            return
        record = EvalRecord(stage=stage, step=step, loss=result.loss, gate=result.gate, yardsticks=result.yardsticks)
        self._metrics.write_eval(record)
        if stage == 2 and not self.facts.stage_steps[1]:  # left out: all was said at the end of stage 1
            return
        fused = "  ".join(f"{name} {losses['fused']:.4f}" for name, losses in record.loss.items())
        when = self._when(step)
        self.note(f"held-out loss of the {self.facts.trained} model {when}: {fused}  mean {record.mean['fused']:.4f}")

    def _when(self, step: int) -> str:
        """Behind ``step`` steps, counted through both stages, in words that count within a stage."""
        first, second = self.facts.stage_steps
        if step > first:
            return f"after stage 2 step {step - first} of {second}"
        return f"after stage 1 step {step} of {first}" if step else "before training"

    def stopped(self, why: str) -> None:
        """The run ends before its last step; the last line of all says why."""
        self._console.end_stage()
        self.note(why)

    def finish(self, final: EvaluationResult, views: Sequence[TokenSample]) -> None:
        """The run is over: tables, plots, the token view and summary.json.

        The tables compare the fused model with the specialists as they came: their losses and the yardsticks are of the
        last evaluation in which they still were, of stage 1. ``views`` are the samples to colour token by token.
        """
        stage1_steps, stage2_steps = self.facts.stage_steps
        last = max(self._done, stage1_steps)  # a stage may have ended before its last step
        self.evaluated(final, 2, last)
        if self._metrics is None:
            return
        steps, evals = read_metrics(self.run_dir)
        before = next((record for record in reversed(evals) if record.stage == 1), None)
        if before is None:
            self.note("metrics.jsonl lacks the evaluations of stage 1: the table shows no specialists")
        loss = {
            name: {**(before.loss[name] if before else {}), "fused": losses["fused"]}
            for name, losses in final.loss.items()
        }
        yardsticks = before.yardsticks if before else {}
        record = EvalRecord(stage=2, step=last, loss=loss, gate=final.gate, yardsticks=yardsticks)
        after_stage1 = None
        if stage1_steps and stage2_steps:  # else it is the end, or the beginning
            after_stage1 = next((e for e in reversed(evals) if e.stage == 1 and e.step), None)
        tables = [loss_table(record, after_stage1=after_stage1, trained=self.facts.trained), gate_table(record)]
        self._console.end_stage()  # a live display would draw over the tables
        print_tables(tables)
        text = "\n\n".join(f"**{table.title}**\n\n{to_markdown(table)}" for table in tables)
        (self.run_dir / "results.md").write_text(text)
        self._draw(steps, evals, final, views)
        seconds = sum(step.seconds for step in steps)
        summary = build_summary(
            record,
            tokens_per_s=sum(step.tokens for step in steps) / seconds if seconds else 0.0,
            steps=len(steps),
            layout=self.facts.layout,
            device=self.facts.device,
            wall_s=time.perf_counter() - self._started,
            after_stage1=after_stage1,
            gate_per_sample=final.gate_per_sample(),
        )
        write_summary(self.run_dir, summary)
        self.note(f"{self.run_dir} holds {_found(self.run_dir)}")

    def _draw(
        self, steps: list[StepRecord], evals: list[EvalRecord], final: EvaluationResult, views: Sequence[TokenSample]
    ) -> None:
        # Here: matplotlib takes a second to import, and of a job's ranks one draws, in the end.
        from ultrafuser_mega.reporting.plots import plot_gate_heatmap, plot_gate_over_steps, plot_losses

        plots = self.run_dir / "plots"
        plots.mkdir(exist_ok=True)
        specialists = list(self.facts.specialists)
        if steps:
            plot_losses(plots / "loss.png", steps, evals)
            plot_gate_over_steps(plots / "gate_over_steps.png", steps)
        sample_classes = [sample.class_name for sample in final.samples]
        plot_gate_heatmap(plots / "gate_heatmap.png", sample_classes, final.sample_weights(), specialists)
        if views:
            write_token_view(plots / "token_gate.html", views, specialists)


def _found(run_dir: Path) -> str:
    """What a reader of the results finds in the run's folder, in words."""
    files = [name for name in ("summary.json", "results.md") if (run_dir / name).is_file()]
    folders = [name for name in ("plots", "checkpoints") if any((run_dir / name).glob("[!.]*"))]
    *most, last = [*files, *(f"{name}/" for name in folders)]
    return f"{', '.join(most)} and {last}" if most else last
