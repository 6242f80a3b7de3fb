"""Sharded checkpoints: write under a temporary name, rename when complete, read into any number of ranks.

A checkpoint is a folder ``stage<k>-step<s>`` holding Megatron's distributed checkpoint (torch_dist),
``progress.json``: where the run stood, a description of the model that another model's checkpoint cannot match, and
size and checksum of every other file; and what the specialists came with beside their weights (``sources``). Every
tensor lies in model space under a layout-independent name:

    specialists.<name>.<Megatron name>    heads.<name>    tails.<name>    gate.<...>
    optimizer.<param|exp_avg|exp_avg_sq>.<name of the parameter>

Nothing rank-specific is stored (no parameter groups, no flat buffers), so a plain and a distributed optimizer
read each other's checkpoints too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ultrafuser_mega.checkpoint.integrity import HaveRead, record_files, verify_files, verify_files_here
from ultrafuser_mega.checkpoint.optimizer_state import (
    create_moments,
    restore,
    sharded,
    states_to_read,
    states_to_write,
)
from ultrafuser_mega.checkpoint.sources import SourceFiles
from ultrafuser_mega.errors import InputError, writing
from ultrafuser_mega.models.fused import FusedStage
from ultrafuser_mega.runtime.groups import RankGroups
from ultrafuser_mega.runtime.mcore import megatron_scope, use_plain_results_queue
from ultrafuser_mega.runtime.trainable import Trainable

_NAME = re.compile(r"stage(\d)-step(\d{7})$")
PROGRESS = "progress.json"


@dataclass(frozen=True, order=True)
class Progress:
    """How far a run is: ``step`` steps of ``stage`` are done, ``skipped`` of which updated nothing."""

    stage: int
    step: int
    skipped: int = field(default=0, compare=False)

    @property
    def folder(self) -> str:
        """Name of the checkpoint folder."""
        return f"stage{self.stage}-step{self.step:07d}"

    @property
    def trained(self) -> bool:
        """Whether specialists have been trained: stage 1 leaves them as they came."""
        return self.stage == 2 and self.step > 0


def list_checkpoints(folder: Path) -> list[tuple[Progress, Path]]:
    """Complete checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        if (match := _NAME.match(path.name)) and (path / PROGRESS).is_file():
            found.append((Progress(int(match[1]), int(match[2])), path))
    return sorted(found)


def read_progress(path: Path, identity: Mapping[str, Any]) -> Progress:
    """Where the checkpoint at ``path`` stands.

    Args:
        path: a checkpoint folder.
        identity: description of the model that is to be loaded, as given to :func:`save_checkpoint`.

    Raises:
        InputError: not a complete checkpoint, one of another model (names the first difference), or renamed.
    """
    record = _read_record(path)
    saved, wanted = flat(record["identity"]), flat(json.loads(json.dumps(identity)))
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise InputError(
                f"{path}: checkpoint of another model: {key} is {saved.get(key)!r} there and {wanted.get(key)!r} here"
            )
    progress = Progress(**record["progress"])
    if _NAME.match(path.name) and path.name != progress.folder:
        raise InputError(f"{path}: renamed: its {PROGRESS} is that of {progress.folder}; give it this name back")
    return progress


def verify_checkpoint(path: Path) -> None:
    """Compare every file with its size and checksum as written; collective over the job, which shares the reading.

    One that notes none, as the first versions wrote them, passes.

    Raises:
        InputError: a file is missing or damaged; the same message on every rank.
    """
    verify_files(path, _read_record(path).get("files", {}), advice(path))


def verify_checkpoint_here(path: Path, have_read: HaveRead) -> None:
    """The same as :func:`verify_checkpoint` by one process, without a job; reads all of it.

    Raises:
        InputError: as there.
    """
    verify_files_here(path, _read_record(path).get("files", {}), advice(path), have_read)


def noted_bytes(path: Path) -> int:
    """Of all files that are compared; 0 for a checkpoint that notes none."""
    return sum(noted["bytes"] for noted in _read_record(path).get("files", {}).values())


def _read_record(path: Path) -> dict[str, Any]:
    """What progress.json says: "progress", "identity" and "files"."""
    file = path / PROGRESS
    try:
        record = json.loads(file.read_text())
        if not isinstance(record["identity"], dict) or not isinstance(record.get("files", {}), dict):
            raise TypeError("identity or files is no object")
        Progress(**record["progress"]).folder  # noqa: B018 (raises unless both are whole numbers)
    except FileNotFoundError:
        raise InputError(f"{path}: not a complete checkpoint (no {PROGRESS})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({error!r}); {advice(path)}") from None
    return record


def advice(path: Path) -> str:
    """What to do about damage of the checkpoint at ``path``; ends a message."""
    older = [other.name for _, other in list_checkpoints(path.parent) if other.name < path.name]
    instead = f"for --resume to go on from {older[-1]}" if older else "and start afresh: there is no older one"
    return f"copy the checkpoint again, or remove {path.name} {instead}"


def save_checkpoint(
    folder: Path,
    progress: Progress,
    model: FusedStage,
    trainable: Trainable,
    groups: RankGroups,
    identity: Mapping[str, Any],
    keep: int,
    sources: SourceFiles | None,
) -> Path:
    """Write ``folder/stage<k>-step<s>``; collective over the job. Older checkpoints beyond ``keep`` are removed.

    Raises:
        InputError: it cannot be written; no checkpoint has the name then, and an earlier one of this name stays.
    """
    final, partial = folder / progress.folder, folder / f".{progress.folder}.partial"
    with writing_checkpoint(final):
        if groups.rank == 0:
            for unfinished in folder.glob(".*.partial"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)
        dist.barrier()
        write_checkpoint(partial, progress, model, trainable, groups, identity, sources)
        if groups.rank == 0:
            remove_checkpoint(final)
            partial.rename(final)
            for _, old in list_checkpoints(folder)[:-keep]:
                remove_checkpoint(old)
        dist.barrier()
    return final


def remove_checkpoint(path: Path) -> None:
    """Remove the folder ``path`` if there is one; what is left of it when that is interrupted has no final name."""
    if path.exists():
        leaving = path.with_name(f".{path.name}.old.partial")  # which the next save clears away
        shutil.rmtree(leaving, ignore_errors=True)
        path.rename(leaving)
        shutil.rmtree(leaving)


def write_checkpoint(
    folder: Path,
    progress: Progress,
    model: FusedStage,
    trainable: Trainable | None,
    groups: RankGroups,
    identity: Mapping[str, Any],
    sources: SourceFiles | None,
) -> None:
    """Write a checkpoint into ``folder``, its progress.json last; collective over the job.

    Args:
        folder: empty; what it is called is up to the caller, who gives it its final name when this is done.
        progress: where the run stands.
        model: this rank's share.
        trainable: whose optimizer to write too; None for weights alone, which belongs to step 0.
        groups: this rank's process groups.
        identity: description of the model, checked on reading.
        sources: where its specialists came from, written into the folder; rank 0's, others need none.
    """
    state = rank_state(model, trainable, groups)
    with megatron_scope(next(model.parameters()).device):
        use_plain_results_queue()
        dist_checkpointing.save(state, str(folder))
    if groups.rank == 0:
        assert sources is not None
        sources.write(folder)
    dist.barrier()
    files = record_files(folder)
    if groups.rank == 0:
        record = {"progress": asdict(progress), "identity": identity, "files": files}
        (folder / PROGRESS).write_text(json.dumps(record, indent=1))


@contextmanager
def writing_checkpoint(path: Path) -> Iterator[None]:
    """What the system has against it, which the library below may wrap, as an InputError.

    Args:
        path: the name that the checkpoint gets when it is complete.
    """
    with writing(path, as_whole=True):
        try:
            yield
        except CheckpointException as error:
            reason = str(error).strip().splitlines()[-1]
            if not error.failures:  # the library has printed it, rank by rank
                reason = "a rank could not write its part, as the lines above say"
            raise OSError(reason) from None


def load_checkpoint(
    path: Path,
    model: FusedStage,
    groups: RankGroups,
    trainable: Trainable | None,
    steps: int,
    skipped: int = 0,
) -> None:
    """Read the model, and with ``trainable`` its optimizer too; collective over the job.

    The first replica reads the model, and the others receive it.

    Args:
        path: a checkpoint folder.
        model: filled in place.
        groups: this rank's process groups; they may differ from those it was saved with.
        trainable: the stage's optimizer and schedule, advanced to ``steps``; None to read weights only.
        steps: steps that were done in the stage; a checkpoint of step 0 holds no optimizer state.
        skipped: of them, those that updated nothing.
    """
    device = next(model.parameters()).device
    with megatron_scope(device), torch.no_grad():
        state = _model_state(model, groups)
        parameters = {key: shard.data for key, shard in state.items()}
        moments, optimizer = trainable is not None and steps > 0, dict[str, Any]()
        if trainable is not None and moments:
            create_moments(trainable, steps - skipped)
            optimizer = sharded(states_to_read(trainable), state)
        loaded = dist_checkpointing.load((state if groups.reads else {}) | optimizer, str(path))
        if groups.reads:
            for key, parameter in parameters.items():
                parameter.copy_(loaded[key])
        groups.receive(parameters.values())
        if trainable is not None:
            if not any(key.startswith("optimizer.param.") for key in loaded):
                trainable.optimizer.reload_model_params()  # the model's own weights are the master weights
            if moments:
                restore(trainable, loaded, parameters)
            trainable.schedule.step(steps)


def load_specialists(path: Path, model: FusedStage, groups: RankGroups) -> None:
    """Read the weights but for the gate's into a model of some of the checkpoint's specialists; collective."""
    with megatron_scope(next(model.parameters()).device), torch.no_grad():
        state = {key: shard for key, shard in _model_state(model, groups).items() if not key.startswith("gate.")}
        parameters = {key: shard.data for key, shard in state.items()}
        loaded = dist_checkpointing.load(state, str(path))
        for key, parameter in parameters.items():
            parameter.copy_(loaded[key])


def rank_state(model: FusedStage, trainable: Trainable | None, groups: RankGroups) -> dict[str, Any]:
    """Flat name -> ShardedTensor of all that this rank writes into a checkpoint; collective over the replicas."""
    with megatron_scope(next(model.parameters()).device):
        state = _model_state(model, groups)
        return state if trainable is None else state | sharded(states_to_write(trainable, groups), state)


def _model_state(model: FusedStage, groups: RankGroups) -> dict[str, Any]:
    """Flat name -> ShardedTensor (or factory of several) of everything this rank holds of the model."""
    state: dict[str, Any] = {}
    metadata = {"dp_cp_group": groups.data}
    for name, stage in model.stages.items():
        shards = stage.sharded_state_dict(prefix=f"specialists.{name}.", metadata=metadata)
        state |= {key: shard for key, shard in shards.items() if isinstance(getattr(shard, "data", None), Tensor)}
    if model.fusion is not None:
        state |= model.fusion.sharded_state_dict(groups.replica_index)
    return state


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}" if prefix else key).items()}
