"""In from Hugging Face folders: a checkpoint of step 0, which export gives back equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.checkpoint.checkpoint import Progress, write_checkpoint
from ultrafuser_mega.checkpoint.sources import Sources
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.dtypes import DTYPES
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.models.fused import build_fused_stage, load_hf_weights
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.models.hf_folder import (
    Architecture,
    HFWeights,
    TensorFolder,
    check_parallel_sizes,
    read_architecture,
)
from ultrafuser_mega.planning.preflight import shared_vocabulary
from ultrafuser_mega.runtime.groups import make_groups
from ultrafuser_mega.runtime.layout import LayoutPlan, plan_colocated
from ultrafuser_mega.runtime.mcore import megatron_scope
from ultrafuser_mega.runtime.spawn import run_ranks

SINGLE = "specialist"  # the name of a specialist that comes alone


@dataclass(frozen=True)
class ImportPlan:
    """What is imported, with everything checked that can be.

    Attributes:
        sources: folders and templates of the specialists.
        architectures: name -> its architecture, in the order of the gate weights.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate, which is freshly initialised.
        seed: of the gate.
        dtype: of the checkpoint's weights.
    """

    sources: Sources
    architectures: Mapping[str, Architecture]
    vocab_size: int
    gate_units: int
    seed: int
    dtype: torch.dtype

    @property
    def notices(self) -> list[str]:
        """For people: what the checkpoint holds otherwise than the folders."""
        tied = [name for name, arch in self.architectures.items() if arch.tied]
        return [f"{name}: output head tied to the embedding; the checkpoint holds both" for name in tied]


def plan_folders(folders: Mapping[str, Path], dtype: torch.dtype | None) -> ImportPlan:
    """Import specialists without a run around them; raises InputError where a folder is unusable.

    They share as many vocabulary entries as the smallest of them has. ``dtype`` None takes the smallest type that
    holds all of the folders'.
    """
    archs = {name: read_architecture(folder) for name, folder in folders.items()}
    vocab_size = min(arch.vocab_rows for arch in archs.values())
    units = max(arch.hidden_size for arch in archs.values())
    return _checked(Sources(folders, dict.fromkeys(folders, "hf"), None), archs, vocab_size, units, 0, dtype)


def plan_config(config: FuserConfig, dtype: torch.dtype | None) -> ImportPlan:
    """Import the specialists of a run; raises InputError where one is unusable."""
    archs = {name: read_architecture(folder) for name, folder in config.folders.items()}
    units = config.gate.hidden_size or max(arch.hidden_size for arch in archs.values())
    return _checked(Sources.of(config), archs, shared_vocabulary(config), units, config.seed, dtype)


def _checked(
    sources: Sources,
    archs: Mapping[str, Architecture],
    vocab_size: int,
    gate_units: int,
    seed: int,
    dtype: torch.dtype | None,
) -> ImportPlan:
    found: set[torch.dtype] = set()
    for name, arch in archs.items():
        HFWeights(sources.folders[name], arch)
        tensors = TensorFolder(sources.folders[name])
        for tensor in tensors.names():
            if tensors.dtype(tensor) not in DTYPES.values():
                raise InputError(
                    f"{sources.folders[name]}: tensor {tensor} is {tensors.dtype(tensor)}; expected fp32, bf16 or fp16"
                )
            found.add(tensors.dtype(tensor))
    return ImportPlan(sources, archs, vocab_size, gate_units, seed, dtype or reduce(torch.promote_types, found))


def import_specialists(
    plan: ImportPlan, out: Path, layout: LayoutPlan | None = None, *, timeout_s: float = 24 * 3600.0
) -> None:
    """Write the checkpoint ``out``; by default one process holds all of the weights.

    Args:
        plan: what to import.
        out: must not exist.
        layout: ranks to write it with, which changes how its files are cut and nothing else.
        timeout_s: after which the import counts as failed.

    Raises:
        InputError: ``out`` exists, or the layout does not fit a specialist.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; nothing is overwritten, choose another name or remove it")
    layout = layout or plan_colocated(list(plan.architectures), tp=1, pp=1, dp=1)
    for name, arch in plan.architectures.items():
        check_parallel_sizes(name, arch, layout.placements[name].tp, layout.placements[name].pp)
    run_ranks(_import_rank, layout.world_size, plan, out, layout, timeout_s=timeout_s)


def _import_rank(rank: int, plan: ImportPlan, out: Path, layout: LayoutPlan) -> None:
    device = torch.device("cpu")
    groups = make_groups(layout)
    with megatron_scope(device):
        model = build_fused_stage(
            groups,
            plan.architectures,
            vocab_size=plan.vocab_size,
            gate_units=plan.gate_units,
            dtype=plan.dtype,
            device=device,
            sequence_parallel=False,
            loss=LossOptions(),
            seed=plan.seed,
        )
    load_hf_weights(model, plan.sources.folders)
    identity: dict[str, Any] = {
        "vocab_size": plan.vocab_size,
        "gate_units": plan.gate_units,
        "specialists": {name: asdict(arch) for name, arch in plan.architectures.items()},
    }
    write_checkpoint(out, Progress(1, 0), model, None, groups, identity, plan.sources.read() if rank == 0 else None)
