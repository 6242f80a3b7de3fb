"""In from Hugging Face folders and releases: a checkpoint of step 0, which export gives back equal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from ultrafuser_mega.checkpoint.checkpoint import write_checkpoint
from ultrafuser_mega.checkpoint.chunks import chunks_to_write
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.sources import SOURCES, Sources, element_types, rounding
from ultrafuser_mega.checkpoint.unfinished import alone, finish, refuse_existing, unfinished_of
from ultrafuser_mega.config import FuserConfig
from ultrafuser_mega.convert.released import ReleasedModel
from ultrafuser_mega.convert.shards import check_hashes
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.models.fused import build_fused_stage, load_hf_weights
from ultrafuser_mega.models.fusion_head import LossOptions
from ultrafuser_mega.models.hf_folder import (
    Architecture,
    HFWeights,
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
        sources: what is imported: folders and templates of specialists, or a release.
        architectures: name -> its architecture, in the order of the gate weights.
        vocab_size: entries of the shared vocabulary.
        gate_units: hidden units of the gate, which is freshly initialised unless a release brings it.
        seed: of the gate.
        dtype: of the checkpoint's weights.
        element_types: specialist, or "the gate" that is brought -> tensor -> its type.
    """

    sources: Sources | ReleasedModel
    architectures: Mapping[str, Architecture]
    vocab_size: int
    gate_units: int
    seed: int
    dtype: torch.dtype
    element_types: Mapping[str, Mapping[str, torch.dtype]]

    @property
    def notices(self) -> list[str]:
        """For people: what the checkpoint holds otherwise than the folders."""
        tied = [name for name, arch in self.architectures.items() if arch.tied]
        lost = {name: rounding(types, self.dtype) for name, types in self.element_types.items()}
        return [
            *(f"{name}: output head tied to the embedding; the checkpoint holds both" for name in tied),
            *(f"{name}: {what}; leave out --dtype to keep them as they are" for name, what in lost.items() if what),
        ]

    def settings(self, checkpoint: Path) -> dict[str, Any]:
        """What the configuration of a run says that begins with this release's weights, imported into ``checkpoint``.

        Its specialists are the folders in the checkpoint, which have no weights and need none.
        """
        templates = self.sources.templates
        settings: dict[str, Any] = {
            "models": str(checkpoint / SOURCES),
            "specialists": {name: {"path": name, "template": templates[name]} for name in self.architectures},
            "checkpoint": {"start": str(checkpoint)},
        }
        if self.vocab_size != min(arch.vocab_rows for arch in self.architectures.values()):
            settings["vocab_size"] = self.vocab_size
        if self.gate_units != max(arch.hidden_size for arch in self.architectures.values()):
            settings["gate"] = {"hidden_size": self.gate_units}
        return settings


def plan_folders(folders: Mapping[str, Path], dtype: torch.dtype | None) -> ImportPlan:
    """Import specialists without a run around them; raises InputError where a folder is unusable.

    They share as many vocabulary entries as the smallest of them has. ``dtype`` None takes the smallest type that
    holds all of the folders'.
    """
    archs = {name: read_architecture(folder) for name, folder in folders.items()}
    vocab_size = min(arch.vocab_rows for arch in archs.values())
    units = max(arch.hidden_size for arch in archs.values())
    sources = Sources(folders, dict.fromkeys(folders, "hf"), None)
    types = _element_types(sources, archs)
    return ImportPlan(sources, archs, vocab_size, units, 0, dtype or _holding(types), types)


def plan_config(config: FuserConfig, dtype: torch.dtype | None) -> ImportPlan:
    """Import the specialists of a run; raises InputError where one is unusable.

    ``dtype`` None takes the smallest type that holds all of the folders' and the run's own, which its gate has.
    """
    sources = Sources.of(config)
    archs = {name: read_architecture(folder) for name, folder in sources.folders.items()}
    vocab_size = shared_vocabulary(config)
    units = config.gate.hidden_size or max(arch.hidden_size for arch in archs.values())
    types = _element_types(sources, archs)
    return ImportPlan(
        sources, archs, vocab_size, units, config.seed, dtype or _holding(types, DTYPES[config.dtype]), types
    )


def plan_release(folder: Path, dtype: torch.dtype | None) -> ImportPlan:
    """Import a fused model with the gate and the heads that it has; raises InputError where the folder is damaged."""
    model = ReleasedModel(folder)
    check_hashes(folder)
    types = {name: model.element_types(f"specialists.{name}.") for name in model.architectures}
    types["the gate"] = model.element_types("gate.")
    return ImportPlan(
        model, model.architectures, model.vocab_size, model.gate_units, 0, dtype or _holding(types), types
    )


def _element_types(sources: Sources, archs: Mapping[str, Architecture]) -> dict[str, dict[str, torch.dtype]]:
    """Specialist -> tensor -> element type, once its folder was found to hold the model that it describes."""
    for name, arch in archs.items():
        HFWeights(sources.folders[name], arch)
    return {name: element_types(sources.folders[name]) for name in archs}


def _holding(types: Mapping[str, Mapping[str, torch.dtype]], *more: torch.dtype) -> torch.dtype:
    """The smallest element type that holds all of these."""
    return reduce(torch.promote_types, {*more, *(dtype for of_one in types.values() for dtype in of_one.values())})


def import_specialists(
    plan: ImportPlan, out: Path, layout: LayoutPlan | None = None, *, timeout_s: float = 24 * 3600.0
) -> None:
    """Write the checkpoint ``out``; by default one process holds all of the weights.

    It is written under a hidden name beside ``out``, which it gets when it is complete.

    Args:
        plan: what to import.
        out: must not exist.
        layout: ranks to write it with, which changes how its files are cut and nothing else.
        timeout_s: after which the import counts as failed.

    Raises:
        InputError: ``out`` exists or cannot be written, another process is importing or exporting to this name, the
            layout does not fit a specialist, or a value is beyond the plan's element type.
    """
    with writing(out):
        refuse_existing(out)
    layout = layout or plan_colocated(list(plan.architectures), tp=1, pp=1, dp=1)
    for name, arch in plan.architectures.items():
        check_parallel_sizes(name, arch, layout.placements[name].tp, layout.placements[name].pp)
    unfinished = unfinished_of(out)
    with writing(unfinished):
        unfinished.mkdir(parents=True, exist_ok=True)
    with alone(unfinished):
        with writing(unfinished):
            refuse_existing(out)  # another process may have been through in the meantime
            if any(unfinished.iterdir()):
                raise InputError(f"{unfinished}: left by an interrupted import or export; remove it")
        try:
            run_ranks(_import_rank, layout.world_size, plan, unfinished, out, layout, timeout_s=timeout_s)
            with writing(out):
                finish(unfinished, out)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _import_rank(rank: int, plan: ImportPlan, folder: Path, out: Path, layout: LayoutPlan) -> None:
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
    if isinstance(plan.sources, ReleasedModel):
        plan.sources.load(model)
    else:
        load_hf_weights(model, plan.sources.folders, groups)
    identity: dict[str, Any] = {
        "vocab_size": plan.vocab_size,
        "gate_units": plan.gate_units,
        "specialists": {name: asdict(arch) for name, arch in plan.architectures.items()},
    }
    sources = plan.sources.read() if rank == 0 else None
    write_checkpoint(folder, out, Progress(1, 0), chunks_to_write(model, None, groups), groups.world, identity, sources)
