"""What a rank of a planned run is put together from: its share of the model, its part of the data, its sources."""

from __future__ import annotations

import torch

from ultrafuser_mega.checkpoint.checkpoint import load_checkpoint, load_teacher
from ultrafuser_mega.checkpoint.sources import SourceFiles, Sources, trained_specialists
from ultrafuser_mega.data.batches import Shard
from ultrafuser_mega.data.tokenizer import TextEncoder
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.models.fused import FusedStage, build_fused_stage, load_hf_weights
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.planning.preflight import RunPlan
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.phases import Phases
from ultrafuser_mega.runtime.trainable import Trainable


def run_sources(plan: RunPlan) -> SourceFiles:
    """What the run's checkpoints keep of its specialists: from where their weights come from."""
    if plan.start is None:
        return Sources.of(plan.config).read(plan.resume[1] if plan.resume else None)
    if plan.resume is not None:
        return SourceFiles.of_checkpoint(plan.resume[1], plan.config, trained=None)
    return SourceFiles.of_checkpoint(
        plan.start[1], plan.config, trained=trained_specialists(plan.start[1], plan.start[0])
    )


def build_model(plan: RunPlan, groups: RankGroups, device: torch.device, phases: Phases | None = None) -> FusedStage:
    """This rank's share of the fused model of ``plan``, weights not loaded."""
    config = plan.config
    with megatron_scope(device):
        return build_fused_stage(
            groups,
            plan.architectures,
            vocab_size=plan.vocab_size,
            gate_units=plan.gate_units,
            dtype=DTYPES[config.dtype],
            device=device,
            sequence_parallel=config.parallel.sequence_parallel,
            loss=LossOptions(config.loss.backend, config.loss.label_smoothing, config.loss.z_loss),
            seed=config.seed,
            recompute_layers=config.parallel.recompute_layers,
            adapters=config.adapters,
            student=config.student,
            phases=phases,
        )


def read_first_weights(plan: RunPlan, model: FusedStage, groups: RankGroups) -> None:
    """Fill ``model`` with the weights that a run begins with; collective over the job."""
    if plan.start is not None:
        load_checkpoint(plan.start[1], model, groups, None, 0, verified=True)
    else:
        load_hf_weights(model, plan.config.folders, groups)
        read_teacher(plan, model, groups)


def read_resumed(plan: RunPlan, model: FusedStage, groups: RankGroups, trainable: Trainable) -> None:
    """Fill ``model`` and what its optimizer holds from the checkpoint that ``plan`` goes on from; collective."""
    assert plan.resume is not None
    progress, path = plan.resume
    load_checkpoint(
        path,
        model,
        groups,
        trainable,
        progress.step,
        progress.skipped,
        verified=True,
        folders=plan.config.folders,
    )
    read_teacher(plan, model, groups)  # of which a small one has nothing


def read_teacher(plan: RunPlan, model: FusedStage, groups: RankGroups) -> None:
    """Fill the teacher's part of ``model``, if it has one; collective over the job."""
    if plan.teacher is not None and plan.config.student is not None:
        load_teacher(plan.teacher, model, groups, plan.config.student)


def make_shard(plan: RunPlan, groups: RankGroups, pad_id: int | None = None) -> Shard:
    """This rank's part of the data-parallel work; ``pad_id`` None: the first specialist's EOS, from its tokenizer."""
    config, placements = plan.config, plan.layout.placements
    sequence_parallel = config.parallel.sequence_parallel
    return Shard(
        dp_rank=groups.replica_index,
        dp_size=plan.layout.dp,
        microbatch_tokens=config.microbatch_tokens,
        specialists=tuple(groups.local_specialists),
        multiples={name: placement.tp if sequence_parallel else 1 for name, placement in placements.items()},
        pad_id=TextEncoder(next(iter(config.folders.values()))).eos_id if pad_id is None else pad_id,
    )
