"""The runs behind the tables, each a command of ultrafuser; it leaves a summary.json, its configuration beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reproduction.rows import (
    AFTER_STAGE_1,
    AVERAGE,
    BTX,
    DIRECT_SAMPLES,
    DIRECT_SAMPLES_GATE,
    DIRECT_STEPS,
    DIRECT_STEPS_GATE,
    FUSECHAT,
    IID,
    LLAMAFUSER,
    SKEWED,
    TASK_ARITHMETIC,
    TOKENS,
    ULTRAFUSER,
    further_tuned,
    on_own_class,
)
from reproduction.trios import FUSED_RUN, Trio
from ultrafuser_mega.baselines.derived import steps_of_both_stages
from ultrafuser_mega.baselines.tuning import STATE
from ultrafuser_mega.checkpoint.checkpoint import list_checkpoints
from ultrafuser_mega.reporting.records import UNIFORM_LOGITS, UNIFORM_PROBABILITIES


@dataclass(frozen=True)
class Experiment:
    """One run.

    Attributes:
        row: of the tables.
        key: of files.
        command: arguments of ultrafuser.
        result: written last.
        run_dir: with metrics.jsonl; None: nothing is trained.
        address: of its model, for ultrafuser evaluate; None: it has no row in table 1.
        state: what there is when it can be resumed.
        go_on: the option that does it.
    """

    row: str
    key: str
    command: tuple[str, ...]
    result: Path
    run_dir: Path | None = None
    address: str | None = None
    state: Path | None = None
    go_on: str = ""

    @property
    def may_lack(self) -> bool:
        """Whether a refusal is a finding, as of weights that cannot be merged, and not the end of all."""
        return self.command[0] == "baseline"

    @property
    def is_done(self) -> bool:
        """Whether it need not run."""
        return self.result.is_file()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command as it is to be started now."""
        goes_on = self.go_on and (self.state is None or self.state.exists())
        return (*self.command, self.go_on) if goes_on else self.command


def experiments(trio: Trio) -> list[Experiment]:
    """All of one seed, what table 1 has first."""
    config, both = trio.config, steps_of_both_stages(trio.config)
    own = [name for name in config.specialists if name in config.data.classes]
    classes = list(config.data.classes)
    weights = "{" + ", ".join(f"{name}: {1 if place else 10}" for place, name in enumerate(classes)) + "}"
    gate = f"stage2.gate_lr={config.stage1.lr}"
    found = [_run(trio, ULTRAFUSER, FUSED_RUN, compared=True)]
    found += [
        _tuned(trio, further_tuned(name), "further-tuned", name, ("--specialist", name)) for name in config.specialists
    ]
    found += [
        _tuned(
            trio, on_own_class(name), "further-tuned", f"{name}-on-{name}", ("--specialist", name, "--classes", name)
        )
        for name in own
    ]
    found.append(_merged(trio, AVERAGE, "average", ()))
    if trio.base is not None:
        found.append(_merged(trio, TASK_ARITHMETIC, "task-arithmetic", ("--base", str(trio.base))))
        found.append(_tuned(trio, LLAMAFUSER, "llamafuser", "", ("--base", str(trio.base))))
    found += [_mixed(trio, BTX, "btx"), _mixed(trio, FUSECHAT, "fusechat")]
    return [
        *found,
        _run(trio, DIRECT_SAMPLES, "direct-samples", "stage1.steps=0", f"stage2.steps={both}"),
        _run(trio, DIRECT_STEPS, "direct-steps", "stage1.steps=0"),
        _run(trio, DIRECT_SAMPLES_GATE, "direct-samples-gate", "stage1.steps=0", f"stage2.steps={both}", gate),
        _run(trio, DIRECT_STEPS_GATE, "direct-steps-gate", "stage1.steps=0", gate),
        _run(trio, IID, "iid", "data.sampling=iid"),
        _run(trio, SKEWED, "skewed", f"data.sampling={weights}"),
        _run(trio, TOKENS, "tokens", "data.sampling=tokens"),
    ]


def missing(trio: Trio) -> dict[str, str]:
    """Row -> why this trio cannot have it."""
    if trio.base is not None:
        return {}
    why = "the specialists have no common base model (give --base where they have one)"
    return {TASK_ARITHMETIC: why, LLAMAFUSER: why}


def addresses(trio: Trio, done: list[Experiment]) -> dict[str, str]:
    """Row -> model, of what is asked the tasks: table 1's rows, and the specialists mixed without training."""
    config = trio.config
    found = {
        name: f"{config.folders[name].absolute()}@{part.template or 'hf'}" for name, part in config.specialists.items()
    }
    found |= {one.row: one.address for one in done if one.address is not None}
    untrained = [path for progress, path in list_checkpoints(config.run_dir / "checkpoints") if progress.stage == 1]
    if untrained and config.stage1.steps:
        found[AFTER_STAGE_1] = str(untrained[-1])
        found[UNIFORM_LOGITS] = f"{untrained[-1]}+uniform"
        found[UNIFORM_PROBABILITIES] = f"{untrained[-1]}+probabilities"
    return found


def _run(trio: Trio, row: str, key: str, *overrides: str, compared: bool = False) -> Experiment:
    run_dir = trio.config.runs / key
    command = ("train", "--config", str(trio.config_path), f"name={key}", *overrides)
    address = str(run_dir) if compared else None
    return Experiment(row, key, command, run_dir / "summary.json", run_dir, address, go_on="--requeue")


def _tuned(trio: Trio, row: str, name: str, suffix: str, options: tuple[str, ...]) -> Experiment:
    key = f"{name}-{suffix}" if suffix else name
    out, run_dir = trio.root / "models" / key, trio.config.runs / f"{FUSED_RUN}-{key}"
    command = ("baseline", name, "--config", str(trio.config_path), "--out", str(out), *options)
    return Experiment(row, key, command, out / "summary.json", run_dir, str(out), go_on="--requeue")


def _merged(trio: Trio, row: str, name: str, options: tuple[str, ...]) -> Experiment:
    out = trio.root / "models" / name
    command = ("baseline", name, "--config", str(trio.config_path), "--out", str(out), *options)
    return Experiment(row, name, command, out / "summary.json", address=str(out))


def _mixed(trio: Trio, row: str, name: str) -> Experiment:
    out, run_dir = trio.root / "models" / name, trio.config.runs / f"{FUSED_RUN}-{name}"
    command = ("baseline", name, "--config", str(trio.config_path), "--out", str(out), "checkpoint.every=50")
    pivot, first = list(trio.config.specialists)[:2]
    trained_first = run_dir if name == "btx" else trio.config.runs / f"{FUSED_RUN}-{name}-{pivot}-{first}"
    return Experiment(row, name, command, out / "summary.json", run_dir, str(out), trained_first / STATE, "--resume")
