"""What a run shows and leaves behind, on the one rank that reports: progress, metrics, tables, plots, summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from filelock import FileLock, Timeout

from ultrafuser_mega.config import dump_config
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.reporting.console import TrainConsole
from ultrafuser_mega.reporting.plots import plot_gate_heatmap, plot_gate_over_steps, plot_losses
from ultrafuser_mega.reporting.records import (
    EvalRecord,
    MetricsWriter,
    StepRecord,
    build_summary,
    read_metrics,
    write_summary,
)
from ultrafuser_mega.reporting.tables import gate_table, loss_table, print_tables, to_markdown
from ultrafuser_mega.reporting.token_view import TokenSample, token_texts, write_token_view
from ultrafuser_mega.training.evaluation import EvaluationResult

_LOCK = ".lock"


@contextmanager
def locked_run(run_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Make ``run_dir`` and keep other jobs out of it; one rank holds the lock.

    Raises:
        InputError: another job has it, or the folder cannot be made.
    """
    with ExitStack() as stack:
        if enabled:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(run_dir / _LOCK, timeout=0))
            except Timeout:
                raise InputError(f"{run_dir}: another job is training under this name; choose another name") from None
            except OSError as error:
                raise InputError(f"{run_dir}: cannot be written: {error.strerror}; use another runs folder") from None
        yield


def set_aside(run_dir: Path) -> Path | None:
    """Keep what an earlier run of the same name left: move it to ``<run_dir>.1`` (or .2, ...), all but its token store.

    Otherwise its checkpoints would pass for the new run's. Returns where it went, None if there was nothing.
    """
    left = [path for path in run_dir.iterdir() if path.name not in ("store", _LOCK)] if run_dir.is_dir() else []
    if not left:
        return None
    number = 1
    while (kept := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    kept.mkdir()
    for path in left:
        path.rename(kept / path.name)
    return kept


class RunReport:
    """Context manager around a run; with ``enabled`` False (all ranks but one) it does nothing.

    Args:
        plan: of the run.
        store: its token store, for the texts of the samples shown.
        device: for the summary.
        enabled: whether this rank reports.
        done_steps: steps that an earlier part of this run did.
    """

    def __init__(
        self, plan: RunPlan, store: TokenStore, device: torch.device, *, enabled: bool, done_steps: int
    ) -> None:
        self.plan, self.store, self.device, self.enabled = plan, store, device, enabled
        self.run_dir = plan.config.run_dir
        self._resumed_at = done_steps if plan.resume else None
        self._started = time.perf_counter()
        self._stack = ExitStack()
        self._console = TrainConsole(enabled=enabled)
        self._metrics: MetricsWriter | None = None

    def __enter__(self) -> RunReport:
        self._stack.enter_context(self._console)
        if self.enabled:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(dump_config(self.plan.config))
            self._metrics = self._stack.enter_context(MetricsWriter(self.run_dir, resume_step=self._resumed_at))
            self.note(f"{self.plan.config.name}: {self.plan.layout.describe()} on {self._device_name()}")
            if self.plan.resume:
                self.note(f"resumed from {self.plan.resume[1]}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def note(self, text: str) -> None:
        """One line that stays."""
        self._console.note(text)

    def begin_stage(self, number: int, title: str, first_step: int, steps: int) -> None:
        """Stage ``number`` follows; ``first_step`` is its own first, counted through both stages."""
        self._console.begin_stage(number, title, first_step=first_step, steps=steps)

    def step(self, record: StepRecord) -> None:
        """A training step was done."""
        if self._metrics is not None:
            self._metrics.write_step(record)
        self._console.step(record)

    def evaluated(self, result: EvaluationResult, stage: int, step: int) -> None:
        """An evaluation was done after ``step`` steps."""
        if self._metrics is None:
            return
        record = EvalRecord(stage=stage, step=step, loss=result.loss, gate=result.gate)
        self._metrics.write_eval(record)
        fused = "  ".join(f"{name} {losses['fused']:.4f}" for name, losses in record.loss.items())
        self.note(f"held-out loss of the fused model after {step} steps: {fused}  mean {record.mean['fused']:.4f}")

    def finish(self, final: EvaluationResult) -> None:
        """The run is over: tables, plots, the token view and summary.json.

        The tables compare the fused model with the specialists as they came: their losses are those of the
        evaluation before training.
        """
        config = self.plan.config
        last = config.stage1.steps + config.stage2.steps
        self.evaluated(final, 2, last)
        if self._metrics is None:
            return
        steps, evals = read_metrics(self.run_dir)
        before = next((record.loss for record in evals if record.step == 0), None)
        if before is None:
            self.note("metrics.jsonl lacks the evaluation before training: the table shows no specialists")
            before = {name: {} for name in final.loss}
        loss = {name: {**before[name], "fused": final.loss[name]["fused"]} for name in final.loss}
        record = EvalRecord(stage=2, step=last, loss=loss, gate=final.gate)
        after_stage1 = next((e for e in evals if e.stage == 1 and e.step == config.stage1.steps > 0), None)
        tables = [loss_table(record, after_stage1=after_stage1), gate_table(record)]
        self._console.end_stage()  # a live display would draw over the tables
        print_tables(tables)
        text = "\n\n".join(f"**{table.title}**\n\n{to_markdown(table)}" for table in tables)
        (self.run_dir / "results.md").write_text(text)
        self._draw(steps, evals, final)
        seconds = sum(step.seconds for step in steps)
        summary = build_summary(
            record,
            tokens_per_s=sum(step.tokens for step in steps) / seconds if seconds else 0.0,
            steps=len(steps),
            layout=self.plan.layout.describe(),
            device=self._device_name(),
            wall_s=time.perf_counter() - self._started,
            after_stage1=after_stage1,
        )
        write_summary(self.run_dir, summary)
        self.note(f"wrote summary.json, results.md, plots/ and checkpoints/ in {self.run_dir}")

    def _draw(self, steps: list[StepRecord], evals: list[EvalRecord], final: EvaluationResult) -> None:
        plots = self.run_dir / "plots"
        plots.mkdir(exist_ok=True)
        specialists = list(self.plan.config.specialists)
        if steps:
            plot_losses(plots / "loss.png", steps, evals)
            plot_gate_over_steps(plots / "gate_over_steps.png", steps)
        averages = np.stack([sample.weights.mean(axis=0) for sample in final.samples])
        plot_gate_heatmap(
            plots / "gate_heatmap.png", [sample.class_name for sample in final.samples], averages, specialists
        )
        if views := self._token_samples(final):
            write_token_view(plots / "token_gate.html", views, specialists)

    def _token_samples(self, final: EvaluationResult) -> list[TokenSample]:
        name, folder = next(iter(self.plan.config.folders.items()))
        tokenizer = TextEncoder(folder).tokenizer

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

        views = []
        for class_name in self.store.class_names:
            of_class = [sample for sample in final.samples if sample.class_name == class_name]
            for gate in of_class[: self.plan.config.evaluation.token_views]:
                sample = self.store.split(class_name, "heldout")[gate.index]
                prompt = str(tokenizer.decode(sample.prompts_of(name)[0].tolist(), skip_special_tokens=True))
                ids = [int(token) for response in sample.responses for token in response]
                tokens = token_texts(ids, decode)
                views.append(
                    TokenSample(
                        class_name=class_name, prompt=prompt, tokens=tokens, weights=gate.weights, losses=gate.losses
                    )
                )
        return views

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
