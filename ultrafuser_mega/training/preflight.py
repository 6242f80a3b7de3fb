"""Everything about a run that can be wrong and can be known before any rank starts work.

Each rank runs this alone, reads the same files and reaches the same verdict, so bad input ends a job at once
and in one line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.config import ColocatedLayout, FuserConfig, Layout
from ultrafuser_mega.data.templates import TEMPLATE_NAMES
from ultrafuser_mega.data.tokenizer import check_tokenizers
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.hf_folder import Architecture, TensorFolder, check_parallel_sizes, read_architecture
from ultrafuser_mega.runtime.layout import LayoutPlan, choose_plan, plan_colocated, plan_disjoint
from ultrafuser_mega.training.checkpoint import Progress, list_checkpoints, read_progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunPlan:
    """A configuration with everything resolved that the outside world decides."""

    config: FuserConfig
    architectures: dict[str, Architecture]
    layout: LayoutPlan
    vocab_size: int
    gate_units: int
    resume: tuple[Progress, Path] | None

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to fit this model."""
        return {
            "vocab_size": self.vocab_size,
            "gate_units": self.gate_units,
            "specialists": {name: asdict(arch) for name, arch in self.architectures.items()},
        }


def plan_layouts(config: FuserConfig) -> list[LayoutPlan]:
    """All configured layouts, resolved; raises InputError for one that cannot be."""
    return [_resolve(config, layout) for layout in config.layouts]


def preflight(config: FuserConfig, world_size: int, resume: bool) -> RunPlan:
    """Check ``config`` against the files it names and the ranks it was launched on.

    Raises:
        InputError: the first thing that is wrong.
    """
    layout = choose_plan(plan_layouts(config), world_size)
    for name, specialist in config.specialists.items():
        if specialist.template not in TEMPLATE_NAMES:
            raise InputError(
                f"specialists.{name}.template: {specialist.template!r} is not known; "
                f"use one of {', '.join(TEMPLATE_NAMES)}"
            )
    architectures = {name: read_architecture(folder) for name, folder in config.folders.items()}
    for name, arch in architectures.items():
        placement = layout.placements[name]
        check_parallel_sizes(name, arch, placement.tp, placement.pp)
        TensorFolder(config.folders[name])
    smallest = min(arch.vocab_rows for arch in architectures.values())
    vocab_size = config.vocab_size or smallest
    if vocab_size > smallest:
        raise InputError(f"vocab_size: {vocab_size} is more than the {smallest} rows of the smallest specialist head")
    check_tokenizers(config.folders, vocab_size)
    for stage_name in ("stage1", "stage2"):
        stage = getattr(config, stage_name)
        batch = stage.samples_per_class * len(config.data.classes)
        share = config.micro_batch_size * layout.dp
        if batch % share:
            raise InputError(
                f"{stage_name}.samples_per_class: {len(config.data.classes)} classes x {stage.samples_per_class} = "
                f"{batch} samples do not split into microbatches of {config.micro_batch_size} "
                f"on {layout.dp} replica(s); make the product a multiple of {share}"
            )
    plan = RunPlan(
        config=config,
        architectures=architectures,
        layout=layout,
        vocab_size=vocab_size,
        gate_units=config.gate.hidden_size or max(arch.hidden_size for arch in architectures.values()),
        resume=None,
    )
    if not resume:
        return plan
    checkpoints = list_checkpoints(config.run_dir / "checkpoints")
    if not checkpoints:
        raise InputError(
            f"--resume: {config.run_dir / 'checkpoints'} holds no complete checkpoint; start without --resume"
        )
    path = checkpoints[-1][1]
    return RunPlan(**{**vars(plan), "resume": (read_progress(path, plan.identity), path)})


def _resolve(config: FuserConfig, layout: Layout) -> LayoutPlan:
    if isinstance(layout, ColocatedLayout):
        return plan_colocated(list(config.specialists), layout.tp, layout.pp, layout.dp)
    sizes = {name: layout.specialists[name] for name in config.specialists}
    return plan_disjoint({name: (s.tp, s.pp, s.first_rank) for name, s in sizes.items()}, layout.dp)
