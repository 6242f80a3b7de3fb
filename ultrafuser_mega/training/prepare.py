"""What a run begins with: its token store, made by one rank and opened by all; a checkpoint that is whole."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ultrafuser_mega.checkpoint.checkpoint import DamagedCheckpointError, verify_checkpoint
from ultrafuser_mega.checkpoint.resume import steps_by_epochs
from ultrafuser_mega.config import FuserConfig, Stage, check_parts
from ultrafuser_mega.data.prepare import prepare_store
from ultrafuser_mega.data.report import PrepareReport
from ultrafuser_mega.data.sampler import make_sampler, passes
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.planning.preflight import RunPlan, gone_back
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.toy import ToyRecipe, make_toy


def make_missing_toy(config: FuserConfig) -> None:
    """Make the toy specialists and their data where the configuration asks for them and they are missing.

    Raises:
        InputError: as :func:`~ultrafuser_mega.toy.make_toy`.
    """
    if config.toy is not None:
        make_toy(config.toy.folder, recipe=ToyRecipe(branched=config.toy.branched))


def prepare(
    config: FuserConfig, vocab_size: int, *, overwrite: bool = False, compare_only: bool = False
) -> PrepareReport:
    """Tokenise the configured data into ``config.store_dir``, or find that this was done; see ``prepare_store``.

    Raises:
        InputError: as ``prepare_store``, and for what the system has against the store's place.
    """
    try:
        return _prepare(config, vocab_size, overwrite, compare_only)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        raise InputError(
            f"data.store: {config.store_dir}: cannot be written ({reason}); choose another place"
        ) from None


def _prepare(config: FuserConfig, vocab_size: int, overwrite: bool, compare_only: bool) -> PrepareReport:
    root = config.data.root
    classes = config.data.classes.values()
    holdout: dict[str | Path, int] = {
        root / path: rows for part in classes for path, rows in part.heldout_first.items()
    }
    return prepare_store(
        config.store_dir,
        {name: [root / path for path in part.train] for name, part in config.data.classes.items()},
        {name: (config.folders[name], specialist.template) for name, specialist in config.specialists.items()},
        vocab_size=vocab_size,
        max_length=config.data.max_length,
        holdout_rows=holdout,
        columns={root / path: columns for part in classes for path, columns in part.columns.items()},
        holdout_files={name: [root / path for path in part.heldout] for name, part in config.data.classes.items()},
        on_malformed=config.data.on_malformed,
        overwrite=overwrite,
        compare_only=compare_only,
        progress=sys.stderr.isatty(),
    )


def data_notes(config: FuserConfig, report: PrepareReport) -> list[str]:
    """How often each stage passes the rows of each class, then what ``report`` found odd; for people, a line each."""
    counts = {name: report.counts(name, "train") for name in config.data.classes}
    sizes = {name: int(of_class["samples"]) for name, of_class in counts.items()}
    responses = {name: int(of_class["response_tokens"]) for name, of_class in counts.items()}
    stages = {
        f"stage {number}": (
            stage.steps,
            make_sampler(config.data.sampling, sizes, responses, stage.samples_per_class, config.seed + number),
        )
        for number, stage in config.stages.items()
    }
    return [*passes(sizes, stages), *report.notices()]


def ended_by_epochs(plan: RunPlan, store: TokenStore) -> RunPlan:
    """``plan`` with the steps that its stages' epochs amount to in ``store``; a resumed run keeps those that it had.

    Raises:
        InputError: a stage becomes shorter than its warm-up.
    """
    known = steps_by_epochs(plan.resume[1], plan.config) if plan.resume is not None else {}
    return replace(plan, config=in_steps(plan.config, store, known))


def in_steps(config: FuserConfig, store: TokenStore, known: Mapping[int, int] | None = None) -> FuserConfig:
    """``config`` with the steps that its stages' epochs amount to in ``store``.

    Args:
        config: of a run.
        store: its data.
        known: stage -> its steps, of those that are known already.

    Raises:
        InputError: a stage becomes shorter than its warm-up.
    """
    rows = sum(len(store.split(name, "train")) for name in store.class_names)
    changed: dict[str, Stage] = {}
    for number, stage in config.stages.items():
        if stage.epochs is None:
            continue
        taken = stage.samples_per_class * len(store.class_names)
        steps = (known or {}).get(number, min(stage.steps, math.ceil(stage.epochs * rows / taken)))
        changed[f"stage{number}"] = stage.model_copy(update={"steps": steps})
    counted = config.model_copy(update=changed)
    try:
        for number, stage in counted.stages.items():
            stage.check_schedule(f"stage{number}")
        check_parts({1: counted.stage1, 2: counted.stage2}, counted.optimizer, list(counted.specialists))
    except InputError as error:
        by = " and ".join(f"{stage}.epochs" for stage in changed)
        raise InputError(f"{error} (its steps are as {by} has them)" if changed else str(error)) from None
    return counted


def open_store(plan: RunPlan, groups: RankGroups) -> TokenStore:
    """Rank 0 prepares the store if need be and checks every byte; then all ranks map it."""
    ready, shared = "store/ready", dist.distributed_c10d._get_default_store()
    if groups.rank == 0:
        prepare(plan.config, plan.vocab_size)
        TokenStore.open(plan.config.store_dir, verify=True)
        shared.set(ready, "")
    # Not a barrier: tokenising a large corpus outlasts the time that a collective may take.
    shared.wait([ready], timedelta(days=7))
    return TokenStore.open(plan.config.store_dir, verify=False)


def intact(plan: RunPlan) -> RunPlan:
    """``plan``, from the newest of the run's checkpoints that is not damaged; collective over the job.

    Raises:
        DamagedCheckpointError: none is, or the one that weights are to begin with.
    """
    damages: list[DamagedCheckpointError] = []
    while plan.resume is not None:
        try:
            verify_checkpoint(plan.resume[1])
            return plan
        except DamagedCheckpointError as damage:
            damages.append(damage)
            plan = gone_back(plan, damages)
    for path in filter(None, (plan.start and plan.start[1], plan.teacher)):
        verify_checkpoint(path)
    return plan
