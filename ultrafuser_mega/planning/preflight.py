"""Everything about a run that can be wrong and can be known before any rank starts work.

Each rank runs this alone, reads the same files and reaches the same verdict, so bad input ends a job at once
and in one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from ultrafuser_mega.checkpoint.checkpoint import DamagedCheckpointError, list_checkpoints, read_progress
from ultrafuser_mega.checkpoint.left_out import LEFT_OUT
from ultrafuser_mega.checkpoint.locate import find_checkpoint
from ultrafuser_mega.checkpoint.progress import Progress
from ultrafuser_mega.checkpoint.resume import changed_data, changed_settings
from ultrafuser_mega.config import GATE, ColocatedLayout, FuserConfig, Layout, check_parts
from ultrafuser_mega.data.columns import check_columns
from ultrafuser_mega.data.files import expand_files, find_format
from ultrafuser_mega.data.store import TokenStore
from ultrafuser_mega.data.templates import TEMPLATE_NAMES
from ultrafuser_mega.data.tokenizer import check_tokenizers, shared_vocab_size
from ultrafuser_mega.errors import InputError
from ultrafuser_mega.files import obstacle_to
from ultrafuser_mega.models.dtypes import DTYPES
from ultrafuser_mega.models.hf_folder import (
    Architecture,
    HFWeights,
    answer_ends,
    check_parallel_sizes,
    check_positions,
    read_architecture,
)
from ultrafuser_mega.planning.notices import folder_notices, idle_replicas, unused_adapters
from ultrafuser_mega.runtime.layout import LayoutPlan, choose_plan, plan_colocated, plan_disjoint


@dataclass(frozen=True)
class RunPlan:
    """A configuration with everything resolved that the outside world decides."""

    config: FuserConfig
    architectures: dict[str, Architecture]
    layout: LayoutPlan
    vocab_size: int
    gate_units: int
    resume: tuple[Progress, Path] | None
    start: tuple[Progress, Path] | None = None  # whose weights it begins with, if not with the folders'
    teacher: Path | None = None  # checkpoint of the fused model that teaches the student
    changes: tuple[str, ...] = ()  # settings that a resumed run had otherwise, for people
    notices: tuple[str, ...] = ()  # what becomes of the specialists' folders, for people

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to fit this model."""
        adapters = {
            name: {"rank": lora.rank, "scale": lora.scale, "targets": ", ".join(lora.targets)}
            for name, lora in self.config.adapters.items()
        }
        return {
            "vocab_size": self.vocab_size,
            "gate_units": self.gate_units,
            "specialists": {name: asdict(arch) for name, arch in self.architectures.items()},
            **({"adapters": adapters} if adapters else {}),
        }


def plan_layouts(config: FuserConfig) -> list[LayoutPlan]:
    """All configured layouts, resolved; raises InputError for one that cannot be."""
    plans = []
    for index, layout in enumerate(config.layouts):
        try:
            plans.append(_resolve(config, layout))
        except InputError as error:
            raise InputError(f"layouts.{index}: {error}") from None
    return plans


def first_layouts_ranks(config: FuserConfig) -> int:
    """Ranks of a job that nobody gave a number: those of the layout that stands first."""
    return plan_layouts(config)[0].world_size


def chosen_layout(plan: RunPlan) -> str:
    """Which of the configured layouts ``plan`` takes, and what the others are for, in one line."""
    plans = plan_layouts(plan.config)
    taken = plans.index(plan.layout)
    others = dict.fromkeys(other.world_size for other in plans if other.world_size != plan.layout.world_size)
    line = f"layouts.{taken}, for {plan.layout.world_size} rank(s)"
    return f"{line}; --ranks {', '.join(map(str, others))} would take another of the layouts" if others else line


def shared_vocabulary(config: FuserConfig) -> int:
    """Entries of the vocabulary that the specialists share: as configured, or all that the smallest head has.

    Raises:
        InputError: more are asked for than the smallest head has.
    """
    smallest = shared_vocab_size(config.folders)
    wanted = config.vocab_size or smallest
    if wanted > smallest:
        raise InputError(f"vocab_size: {wanted} is more than the {smallest} rows of the smallest specialist head")
    return wanted


def preflight(config: FuserConfig, world_size: int, resume: bool) -> RunPlan:
    """Check ``config`` against the files it names and the ranks it was launched on.

    Raises:
        InputError: the first thing that is wrong.
    """
    layout = choose_plan(plan_layouts(config), world_size)
    _check_words(config)
    for number, stage in config.stages.items():
        stage.check_schedule(f"stage{number}")
    check_parts({1: config.stage1, 2: config.stage2}, config.optimizer, list(config.specialists))
    architectures = {name: read_architecture(folder) for name, folder in config.folders.items()}
    for name, arch in architectures.items():
        placement = layout.placements[name]
        check_parallel_sizes(name, arch, placement.tp, placement.pp)
        if config.checkpoint.start is None:
            HFWeights(config.folders[name], arch)
        answer_ends(config.folders[name])
        check_positions("data.max_length", config.data.max_length, name, arch)
    vocab_size = shared_vocabulary(config)
    encoders = check_tokenizers(config.folders, vocab_size)
    check_data_files(config)
    _check_microbatches(config)
    _check_run_dir(config.run_dir)
    _check_reports(config, world_size, resume)
    plan = RunPlan(
        config=config,
        architectures=architectures,
        layout=layout,
        vocab_size=vocab_size,
        gate_units=gate_units(config, architectures),
        resume=None,
    )
    start = _start(config, plan.identity)
    notices = folder_notices(config, architectures, encoders, DTYPES[config.dtype], start)
    plan = replace(
        plan,
        start=start,
        teacher=_teacher(config, plan.identity),
        notices=(*idle_replicas(config, layout.dp), *unused_adapters(config), *notices),
    )
    if not resume:
        _refuse_own_folder("checkpoint.start", None if start is None else start[1], config.run_dir)
        _refuse_own_folder("distil.teacher", plan.teacher, config.run_dir)
        return plan
    checkpoints = list_checkpoints(config.run_dir / "checkpoints")
    if not checkpoints:
        raise InputError(
            f"--resume: {config.run_dir / 'checkpoints'} holds no complete checkpoint; start without --resume"
        )
    return _resumed(plan, checkpoints, ())


def gone_back(plan: RunPlan, damages: Sequence[DamagedCheckpointError]) -> RunPlan:
    """``plan``, whose run was to go on from a checkpoint that is damaged, from an older one; ``changes`` say so.

    Args:
        plan: it goes on from the checkpoint that the last of ``damages`` is of.
        damages: of all that were tried, newest checkpoint first.

    Raises:
        DamagedCheckpointError: there is no older one.
    """
    checkpoints = list_checkpoints(plan.config.run_dir / "checkpoints")
    older = [found for found in checkpoints if plan.resume is not None and found < plan.resume]
    if not older:
        raise damages[-1]
    tried = [damage.problem for damage in damages]
    return _resumed(plan, older, (*tried[:-1], f"{tried[-1]}; goes on from {older[-1][1].name}"))


def _resumed(plan: RunPlan, checkpoints: list[tuple[Progress, Path]], told: tuple[str, ...]) -> RunPlan:
    path = checkpoints[-1][1]
    try:
        progress = read_progress(path, plan.identity)
        changes = changed_settings(path, progress, plan.config)
    except DamagedCheckpointError as damage:
        if len(checkpoints) == 1:
            raise
        told = (*told, f"{damage.problem}; goes on from {checkpoints[-2][1].name}")
        return _resumed(plan, checkpoints[:-1], told)
    if plan.config.checkpoint.weights == "trained" and not (path / LEFT_OUT).is_file():
        raise InputError(
            f"checkpoint.weights: trained would leave out weights that {path} holds, and that the specialists' folders "
            "need not hold any more; go on with all"
        )
    return replace(plan, resume=(progress, path), changes=(*told, *changes))


def outline(config: FuserConfig) -> RunPlan:
    """What can be planned before anything but the specialists' config.json is there: on one rank, to be laid out.

    Weights, tokenizers and data are not looked at.

    Raises:
        InputError: a config.json cannot be read or computed, or sizes of the configuration do not fit it.
    """
    architectures = {name: read_architecture(folder) for name, folder in config.folders.items()}
    for name, arch in architectures.items():
        check_positions("data.max_length", config.data.max_length, name, arch)
    _check_microbatches(config)
    return RunPlan(
        config=config,
        architectures=architectures,
        layout=plan_colocated(list(architectures), 1, 1, 1),
        vocab_size=shared_vocabulary(config),
        gate_units=gate_units(config, architectures),
        resume=None,
    )


def laid_out(config: FuserConfig, world_size: int) -> RunPlan:
    """:func:`outline`, on the first of the layouts that uses ``world_size`` ranks.

    Raises:
        InputError: as :func:`outline`; there is no such layout, or a specialist cannot be cut so.
    """
    plan = replace(outline(config), layout=choose_plan(plan_layouts(config), world_size))
    for name, arch in plan.architectures.items():
        check_parallel_sizes(name, arch, plan.layout.placements[name].tp, plan.layout.placements[name].pp)
    return plan


def gate_units(config: FuserConfig, architectures: Mapping[str, Architecture]) -> int:
    """Hidden units of the gate: as configured, or as wide as the widest specialist."""
    return config.gate.hidden_size or max(architectures[name].hidden_size for name in config.fused)


def compared_with_data(plan: RunPlan, store: TokenStore) -> RunPlan:
    """``plan`` with a remark on all that a resumed run would have otherwise in ``store``, its data.

    Raises:
        InputError: the run cannot go on with these data; see :func:`changed_data`.
    """
    if plan.resume is None:
        return plan
    progress, path = plan.resume
    return replace(plan, changes=(*plan.changes, *changed_data(path, progress, plan.config, store)))


def _start(config: FuserConfig, identity: dict[str, Any]) -> tuple[Progress, Path] | None:
    if config.checkpoint.start is None:
        return None
    if config.checkpoint.weights == "trained":
        raise InputError(
            "checkpoint.weights: trained leaves out what is in the specialists' folders, and with checkpoint.start the "
            "weights are not; use all"
        )
    try:
        path = find_checkpoint(config.checkpoint.start)
        return read_progress(path, identity, adapters_begin=True), path
    except InputError as error:
        raise InputError(f"checkpoint.start: {error}") from None


def _teacher(config: FuserConfig, identity: dict[str, Any]) -> Path | None:
    """The checkpoint of ``distil.teacher``; InputError where it is none, or not of the other specialists fused."""
    if config.distil is None:
        return None
    others = {name: arch for name, arch in identity["specialists"].items() if name != config.distil.student}
    fused = {key: value for key, value in identity.items() if key != "adapters"} | {"specialists": others}
    try:
        path = find_checkpoint(config.distil.teacher)
        read_progress(path, fused)
    except InputError as error:
        raise InputError(f"distil.teacher: {error}") from None
    return path


def _refuse_own_folder(key: str, path: Path | None, run_dir: Path) -> None:
    """Refuse a checkpoint that would not be where it is any more once the run has begun."""
    if path is not None and path.resolve().is_relative_to(run_dir.resolve()):
        raise InputError(
            f"{key}: {path} is of an earlier run of this name, which is set aside when another begins; choose another "
            f"name than {run_dir.name}"
        )


def _check_run_dir(run_dir: Path) -> None:
    """Whether the run could make and write its folder; nothing is made."""
    if obstacle := obstacle_to(run_dir):
        raise InputError(f"runs, name: {obstacle}; choose another runs folder or name")


def _check_reports(config: FuserConfig, ranks: int, resume: bool) -> None:
    """Whether what is asked for beside the run's folder can be had; a resumed run may have fewer ranks than before."""
    profile, steps = config.profile, config.stage1.steps + config.stage2.steps
    if profile.span and profile.span[-1] > steps:
        raise InputError(f"profile.steps: {profile.steps}: the run has {steps} steps; give some of 1:{steps}")
    for rank in profile.ranks if profile.span and not resume else ():
        if rank >= ranks:
            raise InputError(f"profile.ranks: {rank}: the job has ranks 0 to {ranks - 1}")
    if config.report.wandb is not None and find_spec("wandb") is None:
        raise InputError("report.wandb: wandb is not installed; pip install wandb, or leave report.wandb out")
    folder = (config.report.prometheus or Path()).absolute().parent
    if config.report.prometheus is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise InputError(f"report.prometheus: {folder}: not a folder that this user can write in; make it, or another")


def _check_words(config: FuserConfig) -> None:
    """Names and choices that the configuration's own types cannot judge."""
    taken = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
    for name, specialist in config.specialists.items():
        if name in taken:
            raise InputError(f"specialists.{name}: torch keeps the name {name!r} for itself; choose another")
        if specialist.template not in TEMPLATE_NAMES:
            known = ", ".join(TEMPLATE_NAMES)
            raise InputError(f"specialists.{name}.template: {specialist.template!r} is not known; use one of {known}")
    if config.evaluation.patience is not None and not config.evaluation.every:
        raise InputError(
            f"evaluation.patience: {config.evaluation.patience} counts evaluations on the way, of which "
            "evaluation.every 0 makes none; give it a number of steps"
        )
    for number in config.stages:
        beside = [name for name, part in config.parts(number).items() if part.trains and name != GATE]
        if config.loss.backend == "gate_only" and beside:
            raise InputError(
                f"loss.backend: gate_only cannot train {beside[0]} in stage {number}; use auto, which takes "
                "it where the gate trains alone"
            )


def _check_microbatches(config: FuserConfig) -> None:
    if config.microbatch_tokens < config.data.max_length:
        raise InputError(
            f"microbatch_tokens: {config.microbatch_tokens} cannot hold a sample of data.max_length "
            f"{config.data.max_length}; set microbatch_tokens to {config.data.max_length} or more"
        )


def check_data_files(config: FuserConfig) -> None:
    """That the data's files are there and its keys name them; InputError for the first that is not so."""
    root = config.data.root
    for name, part in config.data.classes.items():
        where = f"data.classes.{name}"
        train = _data_files(f"{where}.train", root, part.train)
        _data_files(f"{where}.heldout", root, part.heldout)
        for path in part.heldout_first:
            if root / path not in train:
                names = ", ".join(map(str, part.train))
                within = [str(file.relative_to(root)) for file in train if file.name == path.name]
                meant = f"; did you mean {within[0]}?" if within else ""
                raise InputError(f"{where}.heldout_first: {path} is not one of its training files, {names}{meant}")
        for path, columns in part.columns.items():
            if path not in (*part.train, *part.heldout):
                entries = ", ".join(map(str, [*part.train, *part.heldout]))
                raise InputError(f"{where}.columns: {path} is not one of its entries, {entries}")
            with _named(f"{where}.columns.{path}"):
                check_columns(columns)
        if not part.heldout and not part.heldout_first:
            raise InputError(f"{where}: nothing is held out to evaluate on; give heldout files or heldout_first rows")


def _data_files(where: str, root: Path, entries: Sequence[Path]) -> list[Path]:
    """The files that the entries stand for; InputError for what is not there or in no format that is read."""
    with _named(where):
        files = [file for entry in entries for file in expand_files(root / entry)]
        for file in files:
            find_format(file)
    return files


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the key before what is wrong with its value."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _resolve(config: FuserConfig, layout: Layout) -> LayoutPlan:
    if isinstance(layout, ColocatedLayout):
        return plan_colocated(list(config.specialists), layout.tp, layout.pp, layout.dp)
    sizes = {name: layout.specialists[name] for name in config.specialists}
    return plan_disjoint({name: (s.tp, s.pp, s.first_rank) for name, s in sizes.items()}, layout.dp)
