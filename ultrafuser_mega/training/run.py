"""The whole run: prepare, stage 1 (gate only), stage 2 (everything), evaluate, checkpoint, report.

Algorithm 1 of the paper. Read :func:`run` first: it is the table of contents.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
import torch.distributed as dist

from ultrafuser_mega.checkpoint.checkpoint import load_checkpoint
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.config import dump_config
from ultrafuser_mega.data.report import PrepareReport
from ultrafuser_mega.planning.hardware import peak_flops
from ultrafuser_mega.planning.preflight import RunPlan, compared_with_data
from ultrafuser_mega.reporting.records import FUSED
from ultrafuser_mega.reporting.run_report import RunFacts, RunReport
from ultrafuser_mega.runtime.device import device_name
from ultrafuser_mega.runtime.groups import RankGroups, make_groups
from ultrafuser_mega.runtime.watchdog import Watchdog
from ultrafuser_mega.training.assembly import make_shard
from ultrafuser_mega.training.lessons import Answering
from ultrafuser_mega.training.prepare import data_notes, ended_by_epochs, intact, open_store
from ultrafuser_mega.training.run_folder import begin_run, locked_run
from ultrafuser_mega.training.skipping import RollBack
from ultrafuser_mega.training.stage import train_stage
from ultrafuser_mega.training.stopping import Stop
from ultrafuser_mega.training.token_samples import token_samples
from ultrafuser_mega.training.trainer import Trainer


def run(
    plan: RunPlan, device: torch.device, signs: dist.Store | None = None, answering: Answering | None = None
) -> Stop | None:
    """Train and report as ``plan`` says; collective over the job, which must be joined already.

    Args:
        plan: of the run.
        device: where this rank computes.
        signs: where ranks see that one of them hangs, as :class:`ultrafuser_mega.runtime.watchdog.Watchdog` has it;
            None: nobody looks.
        answering: of models, for a distillation that learns from answers.

    Returns why the run stopped before its end, behind a checkpoint; None: it did not.
    """
    begun = time.monotonic()
    groups = make_groups(plan.layout)
    with locked_run(plan.config.run_dir, enabled=groups.rank == 0):
        plan = intact(plan)
        store = open_store(plan, groups)
        plan = ended_by_epochs(compared_with_data(plan, store), store)
        peak = peak_flops(device_name(device), plan.config.dtype)
        trainer = Trainer(plan, groups, store, device, make_shard(plan, groups), begun, peak, answering)
        if signs is not None and (seconds := 60 * plan.config.faults.hang_minutes):
            ranks = plan.layout.world_size
            trainer.watching = Watchdog(signs, groups.rank, ranks, trainer.phases, lambda: trainer.at, seconds).watching
        trainer.load()
        while isinstance(end := _run(plan, groups, trainer), RollBack):
            plan = trainer.plan = intact(replace(plan, resume=(end.progress, end.path), changes=()))
        return end


def _run(plan: RunPlan, groups: RankGroups, trainer: Trainer) -> Stop | RollBack | None:
    done = plan.resume[0] if plan.resume else Progress(1, 0)
    # Only now: what could be wrong with the input has been seen, and the earlier run was where it was until here.
    kept = begin_run(plan.config.run_dir, fresh=plan.resume is None) if groups.rank == 0 else None
    begun = trainer.global_step(done)
    with RunReport(run_facts(plan, trainer.device), enabled=groups.rank == 0, done_steps=begun) as report:
        if kept:
            report.note(f"an earlier run of this name is kept as {kept}")
        for line in plan.changes if plan.resume else plan.notices:
            report.note(line)
        store = trainer.store
        for line in data_notes(plan.config, PrepareReport(store.folder, store.manifest, reused=True)):
            report.note(line)
        if plan.start and not plan.resume:
            report.note(f"begins with the weights of {plan.start[1]}")
        if plan.resume is not None and done == Progress(1, 0):  # weights that were imported, nothing trained yet
            load_checkpoint(plan.resume[1], trainer.model, groups, None, 0, verified=True)
        if done == Progress(1, 0):
            report.evaluated(trainer.evaluate(trained=False), done.stage, 0)
        with trainer.stopping.listening():
            for stage in plan.config.stages:
                begin = done if done.stage == stage else Progress(stage, 0)
                if done.stage <= stage and (end := train_stage(trainer, begin, report)):
                    report.stopped(end.why)
                    return end
            final = trainer.evaluate()
            report.finish(final, token_samples(plan.config, trainer.store, final) if groups.rank == 0 else [])
    return None


def run_facts(plan: RunPlan, device: torch.device) -> RunFacts:
    """What the report says of the run that ``plan`` describes."""
    config = plan.config
    return RunFacts(
        name=config.name,
        run_dir=config.run_dir,
        config_text=dump_config(config),
        layout=plan.layout.describe(),
        device=device_name(device),
        specialists=config.fused,
        trained=FUSED if config.distil is None else "distilled",
        stage_steps=(config.stage1.steps, config.stage2.steps),
        resumed_from=plan.resume[1] if plan.resume else None,
        wandb=config.report.wandb,
        prometheus=config.report.prometheus,
    )
